"""GGUF models into Transformers classes: header reader, one file per architecture, tokenizer, loader.

Nothing is imported here, so that `hybridkv.gguf.reader` stays free of torch and Transformers.
"""
