"""Every option of llama.cpp and ik_llama.cpp, and what it is here: one table, from which all else derives.

The options that parsers take without having them, what is said of each, the environment variables, and
docs/from-llama-cpp.md. `rows_*.py` hold the table by subject, `accept.py` and `variables.py` use it.
"""

from hybridkv.cli.llama_cpp.accept import accept_options, accepted_names, accepted_options, given_values, say_accepted
from hybridkv.cli.llama_cpp.table import LLAMA_OPTIONS, llama_option
from hybridkv.cli.llama_cpp.variables import options_from_variables

__all__ = [
    "LLAMA_OPTIONS",
    "accept_options",
    "accepted_names",
    "accepted_options",
    "given_values",
    "llama_option",
    "options_from_variables",
    "say_accepted",
]
