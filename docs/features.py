"""What people use of other programs, and what of it is here: docs/features.md.

One row for each feature. A yes of ours names tests, which `tests/test_docs.py` looks for; a word on another program is
what its documentation says, at the commit below, and nothing where it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = (
    ("llama-server", "https://github.com/ggml-org/llama.cpp/blob/00dc8057ab28/tools/server/README.md"),
    ("ollama", "https://github.com/ollama/ollama/blob/043e9900df57/docs/api/openai-compatibility.mdx"),
    ("LM Studio", "https://github.com/lmstudio-ai/docs/tree/c6854fba2575 (developer, app, cli)"),
)

S, C, E = "tests/server/test_", "tests/cli/test_", "tests/engine/test_"


@dataclass(frozen=True, slots=True)
class Feature:
    """A row: what it is, `yes` or `no` or a few words for each program, and the tests of ours."""

    name: str
    ours: str
    llama_server: str
    ollama: str
    lm_studio: str
    tests: tuple[str, ...] = ()


GROUPS: dict[str, tuple[Feature, ...]] = {
    "Requests": (
        Feature("chat completions", "yes", "yes", "yes", "yes", (f"{S}completions.py::test_chat",)),
        Feature("text completions", "yes", "yes", "yes", "yes", (f"{S}completions.py::test_a_completion",)),
        Feature(
            "streams, with counts at the end",
            "yes",
            "yes",
            "yes",
            "yes",
            (f"{S}completions.py::test_usage_in_a_stream",),
        ),
        Feature(
            "several prompts in one request", "yes", "yes", "no", "", (f"{S}clients.py::test_openai_several_answers",)
        ),
        Feature("`n` answers", "yes", "yes", "no", "", (f"{S}clients.py::test_openai_several_answers",)),
        Feature(
            "log probabilities",
            "yes",
            "yes",
            "no",
            "",
            (f"{S}completions.py::test_logprobs", f"{S}real.py::test_logprobs_are_the_models"),
        ),
        Feature(
            "`echo` with those of the prompt (lm-eval)",
            "yes",
            "",
            "no",
            "",
            (f"{S}real.py::test_echo_scores_the_prompt",),
        ),
        Feature("`stop`", "yes", "yes", "yes", "yes", (f"{S}completions.py::test_stop_strings_across_tokens",)),
        Feature("`seed`", "yes", "yes", "yes", "yes", (f"{S}real.py::test_a_seed_gives_the_same_draw",)),
        Feature("`suffix`", "yes", "`/infill`", "yes", "", (f"{S}prompts.py::test_a_suffix_needs_words_for_it",)),
        Feature(
            "`logit_bias`", "yes", "yes", "no", "yes", (f"{E}sampling.py::test_a_bias_is_added_before_everything",)
        ),
        Feature(
            "presence and frequency penalties",
            "yes",
            "yes",
            "yes",
            "yes",
            (f"{E}sampling.py::test_penalties_are_llama_cpps",),
        ),
        Feature("repeat penalty", "yes", "yes", "", "yes", (f"{E}sampling.py::test_penalties_are_llama_cpps",)),
        Feature(
            "DRY, XTC, typical, min-p",
            "yes",
            "yes",
            "",
            "",
            (f"{E}sampling.py::test_dry_is_llama_cpps", f"{E}sampling.py::test_filters_are_llama_cpps"),
        ),
        Feature("Mirostat", "no", "yes", "", ""),
        Feature("images", "no", "yes", "yes", "yes"),
        Feature(
            "defaults of the server's own",
            "yes",
            "yes",
            "",
            "yes",
            (f"{S}completions.py::test_a_server_has_defaults_of_its_own",),
        ),
        Feature(
            "fields that are not known",
            "passed over and named in a header, or refused (`--strict`)",
            "",
            "",
            "",
            (f"{S}habits.py::test_bodies_of_real_clients", f"{S}habits.py::test_strict_refuses_what_has_no_meaning"),
        ),
        Feature(
            "clients' libraries unchanged", "yes", "", "", "", (f"{S}calls.py::test_calls_of_clients_come_out_right",)
        ),
    ),
    "Tools, thoughts and forms": (
        Feature(
            "tools", "yes", "yes", "yes", "yes", (f"{S}clients.py::test_openai_tools", f"{S}channels.py::test_calls")
        ),
        Feature(
            "`tool_choice`: required, or one by name",
            "yes",
            "",
            "no",
            "",
            (f"{S}steering.py::test_a_required_call_is_one",),
        ),
        Feature("`parallel_tool_calls`", "yes", "yes", "", "", (f"{S}channels.py::test_one_call_ends_the_answer",)),
        Feature("calls streamed", "yes", "yes", "yes", "yes", (f"{S}channels.py::test_arguments_are_streamed",)),
        Feature("JSON by schema", "yes", "yes", "yes", "yes", (f"{S}steering.py::test_answers_have_their_form",)),
        Feature("grammars (GBNF)", "yes", "yes", "", "", (f"{S}steering.py::test_answers_have_their_form",)),
        Feature("regular expressions", "yes", "", "", "", (f"{S}steering.py::test_answers_have_their_form",)),
        Feature(
            "hostile schemas refused in time",
            "yes",
            "",
            "",
            "",
            (f"{S}steering.py::test_hostile_grammars_are_refused_in_time",),
        ),
        Feature("thoughts apart from the answer", "yes", "yes", "yes", "", (f"{S}clients.py::test_openai_thoughts",)),
        Feature("`reasoning_effort`", "yes", "yes", "yes", "yes", (f"{S}prompts.py::test_a_templates_variables",)),
        Feature("a budget of thoughts", "yes", "yes", "", "", (f"{S}steering.py::test_a_budget_closes_thoughts",)),
        Feature(
            "variables of the chat template", "yes", "yes", "", "", (f"{S}prompts.py::test_a_templates_variables",)
        ),
        Feature(
            "what users write is never a control token",
            "yes",
            "",
            "",
            "",
            (f"{S}prompts.py::test_control_words_are_the_templates_and_those_of_a_completion",),
        ),
    ),
    "Around them": (
        Feature("`/v1/responses`", "no", "yes", "yes", "yes"),
        Feature(
            "`/v1/embeddings`",
            "of files with a pooling type",
            "yes",
            "yes",
            "yes",
            (f"{S}embeddings.py::test_the_last_row",),
        ),
        Feature("Anthropic's messages", "no", "yes", "", "yes"),
        Feature(
            "`/tokenize`, `/detokenize`",
            "yes",
            "yes",
            "",
            "in its SDK",
            (f"{S}prompts.py::test_tokens_are_the_tokenizers_own",),
        ),
        Feature("API keys", "yes", "yes", "no", "yes", (f"{S}bad_input.py::test_keys",)),
        Feature(
            "metrics for Prometheus", "yes", "yes", "", "", (f"{S}bad_input.py::test_metrics_count_replies_by_route",)
        ),
        Feature("a page to chat on", "yes", "yes", "", "its app", (f"{S}page.py::test_a_conversation",)),
        Feature(
            "requests side by side", "yes", "yes", "", "yes", (f"{S}real.py::test_many_at_once_are_each_as_alone",)
        ),
        Feature("several models in one process", "no", "yes", "yes", "yes"),
        Feature(
            "conversations saved and restored",
            "yes",
            "yes",
            "",
            "",
            (f"{S}real.py::test_a_session_is_saved_and_restored",),
        ),
        Feature(
            "prompts begin from stored prefixes, of hybrid models too",
            "yes",
            "yes",
            "",
            "",
            (
                f"{S}real.py::test_a_stored_prefix_is_counted",
                f"{E}prefixes.py::test_a_conversation_goes_on_where_it_was",
            ),
        ),
        Feature(
            "the document of the API is tested",
            "yes",
            "",
            "",
            "",
            (f"{S}openapi.py::test_no_reply_contradicts_the_document",),
        ),
        Feature(
            "types of the KV cache, for each request",
            "yes",
            "for the server",
            "",
            "",
            (f"{S}real.py::test_types_of_a_request",),
        ),
    ),
    "On the command line": (
        Feature(
            "a chat in the terminal",
            "yes",
            "llama-cli",
            "`ollama run`",
            "`lms chat`",
            (f"{C}chat.py::test_a_terminal_is_driven",),
        ),
        Feature(
            "grammars, schemas, budgets of thoughts",
            "yes",
            "llama-cli",
            "",
            "",
            (f"{C}form_options.py::test_a_grammar", f"{C}form_options.py::test_a_budget_closes_thoughts"),
        ),
        Feature(
            "chat templates by name",
            "yes",
            "yes",
            "",
            "",
            ("tests/text/test_named_templates.py::test_as_in_llama_cpp",),
        ),
        Feature(
            "models by name, downloads that go on",
            "yes",
            "`-hf`",
            "`ollama pull`",
            "`lms get`",
            (f"{E}hub.py::test_a_download_that_was_cut_goes_on_where_it_was",),
        ),
        Feature(
            "models of the other programs' folders",
            "yes",
            "",
            "",
            "",
            (f"{E}hub.py::test_models_of_other_programs_are_listed_by_the_name_that_opens_them",),
        ),
        Feature(
            "memory is counted before weights are read",
            "yes",
            "",
            "",
            "`--estimate-only`",
            (f"{C}fits.py::test_every_command_that_loads_a_model_refuses",),
        ),
        Feature(
            "longer contexts by YaRN", "yes", "yes", "", "", (f"{C}rope_options.py::test_both_backends_compute_yarn",)
        ),
        Feature(
            "every option of llama.cpp has a meaning or a reason",
            "yes",
            "",
            "",
            "",
            (f"{C}llama_cpp.py::test_no_option_of_theirs_is_unknown",),
        ),
    ),
}


def features_page() -> str:
    """docs/features.md: the table."""
    lines = [
        "# Feature by feature",
        "",
        "Written by `docs/generate.py` from `docs/features.py`. A yes of ours is a test, named in the last column; the other",
        "columns are what each program's documentation says, and empty where it says nothing:",
        "",
        *(f"- {name}: {source}" for name, source in SOURCES),
    ]
    for group, rows in GROUPS.items():
        lines += [
            "",
            f"## {group}",
            "",
            "| | hybridkv | llama-server | ollama | LM Studio | shown by |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            shown = ", ".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
            ours = f"**{row.ours}**" if row.ours == "yes" else row.ours
            lines.append(f"| {row.name} | {ours} | {row.llama_server} | {row.ollama} | {row.lm_studio} | {shown} |")
    return "\n".join(lines) + "\n"
