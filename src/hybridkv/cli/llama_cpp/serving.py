"""Options about serving and logging."""

from __future__ import annotations

from hybridkv.cli.llama_cpp.record import LlamaOption, note, refused, same

_LOG = "messages go to stderr: 2> FILE"
_ONE = "a process serves one model"
_TOOLS = "tools run in the client; a server only names calls"
_CORS = "a page of another origin asks through a proxy"

SERVING: tuple[LlamaOption, ...] = (
    same("-h --help --usage", takes=""),
    same("--version", takes=""),
    refused("--completion-bash", "there is no completion for shells", takes=""),
    same("-np --parallel", env="LLAMA_ARG_N_PARALLEL"),
    note("-ns --sequences", "-np says how many"),
    note(
        "-cb --cont-batching -nocb --no-cont-batching",
        "requests join and leave at any token",
        takes="",
        env="LLAMA_ARG_CONT_BATCHING",
    ),
    note(
        "-kvu --kv-unified -no-kvu --no-kv-unified", "each sequence has -c tokens", takes="", env="LLAMA_ARG_KV_UNIFIED"
    ),
    note("--kv-unified-per-slot", "each sequence has -c tokens", env="LLAMA_ARG_KV_UNIFIED_PER_SLOT"),
    note(
        "--cache-idle-slots --no-cache-idle-slots",
        "--prefix-memory holds prefixes",
        takes="",
        env="LLAMA_ARG_CACHE_IDLE_SLOTS",
    ),
    note(
        "--cache-prompt --no-cache-prompt",
        "--prefix-memory 0 turns prefixes off",
        takes="",
        env="LLAMA_ARG_CACHE_PROMPT",
    ),
    note("--cache-reuse", "rows are not shifted; equal beginnings are reused", env="LLAMA_ARG_CACHE_REUSE"),
    note("-sps --slot-prompt-similarity", "the longest equal beginning is reused"),
    same("-a --alias", env="LLAMA_ARG_ALIAS"),
    note("--tags", "the model's name is all that clients see", env="LLAMA_ARG_TAGS"),
    same("--host", env="LLAMA_ARG_HOST"),
    same("--port", env="LLAMA_ARG_PORT"),
    note("--reuse-port", "one process listens on a port", takes="", env="LLAMA_ARG_REUSE_PORT"),
    note("--path", "the page that comes along is served", env="LLAMA_ARG_STATIC_PATH"),
    note("--cors-origins", _CORS, env="LLAMA_ARG_CORS_ORIGINS"),
    note("--cors-methods", _CORS, env="LLAMA_ARG_CORS_METHODS"),
    note("--cors-headers", _CORS, env="LLAMA_ARG_CORS_HEADERS"),
    note("--cors-credentials --no-cors-credentials", _CORS, takes="", env="LLAMA_ARG_CORS_CREDENTIALS"),
    refused("--api-prefix", "paths begin at /; a proxy adds a prefix", env="LLAMA_ARG_API_PREFIX"),
    note(
        "--ui --webui --no-ui --no-webui", "the page that comes along is always served", takes="[N]", env="LLAMA_ARG_UI"
    ),
    note("--ui-config --webui-config", "the page has no settings", env="LLAMA_ARG_UI_CONFIG"),
    note("--ui-config-file --webui-config-file", "the page has no settings", env="LLAMA_ARG_UI_CONFIG_FILE"),
    note(
        "--ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy --no-webui-mcp-proxy",
        _TOOLS,
        takes="",
        env="LLAMA_ARG_UI_MCP_PROXY",
    ),
    note("--tools", _TOOLS, env="LLAMA_ARG_TOOLS"),
    note("--tools-runtime", _TOOLS, env="LLAMA_ARG_TOOLS_RUNTIME"),
    note("--mcp-servers-config", _TOOLS, env="LLAMA_ARG_MCP_SERVERS_CONFIG"),
    note("--mcp-servers-json", _TOOLS, env="LLAMA_ARG_MCP_SERVERS_JSON"),
    note("-ag --agent -no-ag --no-agent", _TOOLS, takes="", env="LLAMA_ARG_AGENT"),
    same("--api-key", env="LLAMA_API_KEY"),
    refused("--api-key-file", "a key comes by --api-key or HYBRIDKV_API_KEY", env="LLAMA_ARG_API_KEY_FILE"),
    refused("--ssl-key-file", "a proxy speaks TLS", env="LLAMA_ARG_SSL_KEY_FILE"),
    refused("--ssl-cert-file", "a proxy speaks TLS", env="LLAMA_ARG_SSL_CERT_FILE"),
    note("-to --timeout", "a request ends when its client leaves", env="LLAMA_ARG_TIMEOUT"),
    note("--sse-ping-interval", "streams have no pings", env="LLAMA_ARG_SSE_PING_INTERVAL"),
    note("--threads-http", "one thread reads requests", env="LLAMA_ARG_THREADS_HTTP"),
    note("--metrics", "/metrics is always there", takes="", env="LLAMA_ARG_ENDPOINT_METRICS"),
    note("--props", "properties are not changed by requests", takes="", env="LLAMA_ARG_ENDPOINT_PROPS"),
    note("--slots --no-slots", "/health and /metrics say what runs", takes="", env="LLAMA_ARG_ENDPOINT_SLOTS"),
    note("--slot-save-path", "--session-dir DIR keeps what clients save"),
    note("--media-path", "this reads text; images, audio and video are not taken"),
    note("--models-dir", _ONE, env="LLAMA_ARG_MODELS_DIR"),
    note("--models-preset", _ONE, env="LLAMA_ARG_MODELS_PRESET"),
    note("--models-max", _ONE, env="LLAMA_ARG_MODELS_MAX"),
    note("--models-autoload --no-models-autoload", _ONE, takes="", env="LLAMA_ARG_MODELS_AUTOLOAD"),
    note(
        "--prefill-assistant --no-prefill-assistant",
        "the template decides on a last message of the assistant",
        takes="",
        env="LLAMA_ARG_PREFILL_ASSISTANT",
    ),
    note("--sleep-idle-seconds", "a server that waits costs no time"),
    note("--send-done", "streams end with [DONE] anyway", takes=""),
    note("--sql-save-file --sqlite-zstd-ext-file", "conversations are kept by clients"),
    note("--log-disable --log-enable --log-test --log-new --log-append --minilog", _LOG, takes=""),
    note("--log-file", _LOG, env="LLAMA_ARG_LOG_FILE"),
    note("--log-jsonl --no-log-jsonl", _LOG, takes="", env="LLAMA_ARG_LOG_JSONL"),
    note("--log-colors", "NO_COLOR=1 turns colors off", takes="[N]", env="LLAMA_ARG_LOG_COLORS"),
    note("-v --verbose --log-verbose", "every message is printed", takes=""),
    note("-lv --verbosity --log-verbosity", "every message is printed", env="LLAMA_ARG_LOG_VERBOSITY"),
    note("--log-prefix --no-log-prefix", _LOG, takes="", env="LLAMA_ARG_LOG_PREFIX"),
    note("--log-timestamps --no-log-timestamps", _LOG, takes="", env="LLAMA_ARG_LOG_TIMESTAMPS"),
    note("--log-format", _LOG),
    note("-ld --logdir", _LOG),
    note("--log-prompts-dir", "prompts are not kept"),
)
