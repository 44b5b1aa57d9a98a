"""Text in and out of token ids: tokenizers, chat templates, control words, and text as it grows.

Works on any tokenizer that has the few attributes of `tokenizer.TextTokenizer`, Transformers' among them, and imports
none of Transformers.
"""
