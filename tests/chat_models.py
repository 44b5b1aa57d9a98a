"""Chat templates as models bring them, and small tokenizers with the control words of all of them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: one system message, thoughts of earlier turns cut out, answers of tools told from questions.
QWEN = (
    "{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (ns.first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}<|assistant|>\n"
# As Nemotron Nano: switches are taken out of what people write.
REMOVES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | replace('/think', '') | trim }}<|im_end|>\n{% endfor %}"
)
SLICES = "{% for m in messages %}<|im_start|>{{ m.content[1:] }}<|im_end|>{{ m.content[:-1] }}<|im_end|>{% endfor %}"
DUMPS = (
    "{% for m in messages %}<|im_start|>{{ m | tojson }}"
    "{{ m.content | tojson(ensure_ascii=true) }}<|im_end|>{% endfor %}"
)

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def byte_level(template: str, *, control: tuple[str, ...] = CONTROL, plain: tuple[str, ...] = PLAIN) -> Any:
    """Bytes as tokens, as Qwen and Llama 3 have them without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_words(tokenizer, template, control, plain)


def sentencepiece(template: str, *, first: bool = False, control: tuple[str, ...] = CONTROL) -> Any:
    """Characters and bytes as tokens, as Gemma and Mistral have them; `<s>` can be merged from its letters too."""
    letters = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *map(chr, range(33, 127)), "s>", "<s>"]
    vocab = {letter: n for n, letter in enumerate(letters)}
    merges = [("s", ">"), ("<", "s>")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_words(tokenizer, template, control, PLAIN)


def _with_words(tokenizer: Tokenizer, template: str, control: tuple[str, ...], plain: tuple[str, ...]) -> Any:
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=word in control) for word in (*control, *plain)])
    bos = control[0] if "<bos>" not in control else "<bos>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token=bos)
