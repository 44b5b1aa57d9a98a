"""Options about prompts, chats and sampling."""

from __future__ import annotations

from hybridkv.cli.llama_cpp.record import LlamaOption, note, refused, same
from hybridkv.options import SAMPLERS

_SAMPLER = "this sampler is not here; --temp, --top-k, --top-p, --min-p, penalties, DRY, XTC and typical are"
_OF_SAMPLER = "of a sampler that is not here"
_CHAT = "in a chat the model's template does this"
_WORDS = "words are neither banned nor listed here"
_SHOWN = "thinking is shown dimmed in a chat and left in the text of a run"

TEXT: tuple[LlamaOption, ...] = (
    same("-p --prompt"),
    same("-f --file"),
    note("--in-file", "-f takes one file"),
    refused("-bf --binary-file", "prompts are UTF-8 text: use -f"),
    same("-e --escape --no-escape", "escapes are read by default, in -p, -sys and -r", takes=""),
    same("-n --predict --n-predict", "64 tokens by default, chats end by themselves", env="LLAMA_ARG_N_PREDICT"),
    same("--display-prompt --no-display-prompt", "chats show the answer alone", takes=""),
    note("--verbose-prompt", "--json prints the prompt's token ids", takes=""),
    note("-ptc --print-token-count", "figures are printed at the end"),
    same("-sys --system-prompt", "with a chat"),
    same("-sysf -spf --system-prompt-file", "with a chat"),
    same("-r --reverse-prompt"),
    same(
        "-cnv --conversation -no-cnv --no-conversation", "off by default: `hybridkv chat` is the conversation", takes=""
    ),
    same("-st --single-turn", takes=""),
    same("-i --interactive -if --interactive-first", "as -cnv", takes=""),
    note("-mli --multiline-input", "chats take several lines: Alt-Enter, or a pasted text", takes=""),
    note("--simple-io", "plain output where stdout is no terminal", takes=""),
    note("-co --color", "NO_COLOR=1 turns colors off", takes="[N]"),
    note("--in-prefix --in-suffix", _CHAT),
    note("--in-prefix-bos", _CHAT, takes=""),
    refused("--infill", "fill-in-the-middle is a prompt with the model's own words: write them with -p", takes=""),
    note("--spm-infill", "of --infill", takes=""),
    note("--prompt-cache", "--session FILE keeps a conversation"),
    note("--prompt-cache-all --prompt-cache-ro", "--session FILE keeps a conversation", takes=""),
    refused("-sp --special", "control words are not printed; --json has their ids", takes=""),
    note("--jinja --no-jinja", "chat templates are always rendered with Jinja", takes="", env="LLAMA_ARG_JINJA"),
    note("--peg", "answers are not parsed", takes=""),
    same("--chat-template", "a template's text, or a name (chatml, llama3, gemma, ...)", env="LLAMA_ARG_CHAT_TEMPLATE"),
    same("--chat-template-file", env="LLAMA_ARG_CHAT_TEMPLATE_FILE"),
    same("--chat-template-kwargs", env="LLAMA_ARG_CHAT_TEMPLATE_KWARGS"),
    same("-rea --reasoning", "on and off set the template's enable_thinking", env="LLAMA_ARG_REASONING"),
    same("--reasoning-effort", "the template's reasoning_effort", env="LLAMA_ARG_REASONING_EFFORT"),
    same("--reasoning-budget", "in a chat", env="LLAMA_ARG_THINK_BUDGET"),
    note("--reasoning-budget-message", "thoughts are closed without a message", env="LLAMA_ARG_THINK_BUDGET_MESSAGE"),
    note("--reasoning-format", _SHOWN, env="LLAMA_ARG_THINK"),
    note("--reasoning-tokens", _SHOWN),
    note(
        "--reasoning-preserve --no-reasoning-preserve",
        "the template decides",
        takes="",
        env="LLAMA_ARG_REASONING_PRESERVE",
    ),
    note(
        "--skip-chat-parsing --no-skip-chat-parsing",
        "answers are not parsed",
        takes="",
        env="LLAMA_ARG_SKIP_CHAT_PARSING",
    ),
    note("-ptcall --parallel-tool-calls", "tools come in requests", takes=""),
    same("-s --seed"),
    same("--temp --temperature", env="LLAMA_ARG_TEMPERATURE"),
    *(same(" ".join(option.flags), env=option.variable) for option in SAMPLERS if option.is_theirs),
    same("--ignore-eos", takes=""),
    note("--penalize-nl", _OF_SAMPLER, takes=""),
    same("--dry-sequence-breaker"),
    refused("--tfs", _SAMPLER, off="1"),
    refused("--dynatemp-range", _SAMPLER, off="0"),
    note("--dynatemp-exp", _OF_SAMPLER),
    refused("--mirostat", _SAMPLER, off="0"),
    note("--mirostat-lr --mirostat-ent", _OF_SAMPLER),
    refused("--adaptive-target", _SAMPLER, off="-1"),
    note("--adaptive-decay", _OF_SAMPLER),
    note("--adaptive-updt-w-cur", _OF_SAMPLER, takes=""),
    same("-l --logit-bias"),
    same("--samplers"),
    same("--sampler-seq --sampling-seq"),
    note("-bs --backend-sampling", "tokens are drawn on the CPU", takes="", env="LLAMA_ARG_BACKEND_SAMPLING"),
    same("--grammar", "GBNF, or Lark"),
    same("--grammar-file"),
    same("-j --json-schema"),
    same("-jf --json-schema-file"),
    refused("--cfg-negative-prompt", "there is no guidance by a second prompt"),
    refused("--cfg-negative-prompt-file", "there is no guidance by a second prompt"),
    refused("--cfg-scale", "there is no guidance by a second prompt", off="1"),
    refused("--banned-string-file", _WORDS),
    note("--banned-n", _WORDS),
    refused("--allowlist-unicode-rule --allowlist-pieces --allowlist-keyword", _WORDS),
    note("--allowlist-keyword-delay", _WORDS),
    refused("--expiring-logit-bias-file", "likelihoods are not changed here"),
    refused("-o --output --output-file", "the answer goes to stdout: > FILE"),
    refused("--server-base", "this runs a model; openai's client talks to a server"),
    note("--show-timings --no-show-timings", "figures go to stderr", takes="", env="LLAMA_ARG_SHOW_TIMINGS"),
)
