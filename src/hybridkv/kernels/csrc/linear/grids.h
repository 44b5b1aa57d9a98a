// Room for the codebooks of types that index whole groups of values; Python fills it from gguf-py's tables.
#pragma once
