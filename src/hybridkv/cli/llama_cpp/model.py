"""Options about the model: which one, its cache, its context, and what is added to it."""

from __future__ import annotations

from hybridkv.cli.llama_cpp.record import LlamaOption, note, refused, same
from hybridkv.options import KV_OPTIONS

_DRAFT = "guesses come from the text or the model's own head (--spec); the same text comes without"
_URL = "a model comes from a path or by -hf; download the file first"
_PRESET = "name the model with -hf"
_ADAPTER = "adapters are not applied: merge it into the model first"
_IMAGES = "this reads text; images, audio and video are not taken"
_CHECKPOINTS = "`serve --prefix-memory` holds what later prompts resume from"

MODEL: tuple[LlamaOption, ...] = (
    same("-m --model", "a GGUF file or a model directory", env="LLAMA_ARG_MODEL"),
    same("-hf -hfr --hf-repo", "also a directory of safetensors", env="LLAMA_ARG_HF_REPO"),
    same("-hff --hf-file", env="LLAMA_ARG_HF_FILE"),
    same("-hft --hf-token", env="HF_TOKEN"),
    same("--offline", takes="", env="LLAMA_ARG_OFFLINE"),
    note("-cl --cache-list", "`hybridkv models` lists them; this continues", takes=""),
    refused("-mu --model-url", _URL, env="LLAMA_ARG_MODEL_URL"),
    refused("-dr --docker-repo", _URL, takes="[N]", env="LLAMA_ARG_DOCKER_REPO"),
    *(
        refused(name, _PRESET, takes="")
        for name in (
            "--embd-gemma-default --gpt-oss-20b-default --gpt-oss-120b-default",
            "--vision-gemma-4b-default --vision-gemma-12b-default",
            "--fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default --fim-qwen-30b-default",
            "--fim-qwen-7b-spec --fim-qwen-14b-spec",
        )
    ),
    same("-c --ctx-size", "4096 by default; 0: as long as it was trained for, or as fits", env="LLAMA_ARG_CTX_SIZE"),
    note("--keep", "contexts are not shifted, so that nothing of a prompt is lost"),
    same("--context-shift", "refused with the reason, on by any name", takes="[N]", env="LLAMA_ARG_CONTEXT_SHIFT"),
    same("--no-context-shift", "contexts are never shifted", takes=""),
    refused("-gan --grp-attn-n", "self-extend is not computed", env="LLAMA_ARG_GRP_ATTN_N", off="1"),
    note("-gaw --grp-attn-w", "of -gan, which is not computed", env="LLAMA_ARG_GRP_ATTN_W"),
    same("--rope-scaling", env="LLAMA_ARG_ROPE_SCALING_TYPE"),
    same("--rope-scale", env="LLAMA_ARG_ROPE_SCALE"),
    same("--rope-freq-base", env="LLAMA_ARG_ROPE_FREQ_BASE"),
    same("--rope-freq-scale", env="LLAMA_ARG_ROPE_FREQ_SCALE"),
    same("--yarn-orig-ctx", env="LLAMA_ARG_YARN_ORIG_CTX"),
    same("--yarn-ext-factor", env="LLAMA_ARG_YARN_EXT_FACTOR"),
    same("--yarn-attn-factor", env="LLAMA_ARG_YARN_ATTN_FACTOR"),
    same("--yarn-beta-slow", env="LLAMA_ARG_YARN_BETA_SLOW"),
    same("--yarn-beta-fast", env="LLAMA_ARG_YARN_BETA_FAST"),
    same("-okv --override-kv", "of GGUF files"),
    *(
        same(" ".join(option.flags), takes="" if option.is_switch else "N", env=option.variable)
        for option in KV_OPTIONS
        if option.is_theirs
    ),
    note("-dt --defrag-thold", "the cache has no holes", env="LLAMA_ARG_DEFRAG_THOLD"),
    note("-mea --max-extra-alloc", "attention needs no such buffer"),
    note("-dkvc --dump-kv-cache", "the table of layers at the start says what is stored", takes=""),
    note("-ctxcp -ctx-ckpt --ctx-checkpoints --swa-checkpoints", _CHECKPOINTS, env="LLAMA_ARG_CTX_CHECKPOINTS"),
    note("-cms --checkpoint-min-step", _CHECKPOINTS, env="LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT"),
    note("-ctx-ckpt-i --ctx-checkpoints-interval -ctx-ckpt-t --ctx-checkpoints-tolerance", _CHECKPOINTS),
    note("-ctx-ckpt-e --ctx-checkpoints-eviction", _CHECKPOINTS),
    note("-cram --cache-ram", _CHECKPOINTS, env="LLAMA_ARG_CACHE_RAM"),
    note("-crs --cache-ram-similarity -cram-n-min --cache-ram-n-min", _CHECKPOINTS),
    refused("--lora", _ADAPTER),
    refused("--lora-scaled", _ADAPTER, takes="N..."),
    note("--lora-init-without-apply", _ADAPTER, takes=""),
    refused("--control-vector", "control vectors are not added"),
    refused("--control-vector-scaled", "control vectors are not added", takes="N..."),
    note("--control-vector-layer-range", "control vectors are not added", takes="N..."),
    note("-mm --mmproj", _IMAGES, env="LLAMA_ARG_MMPROJ"),
    note("-mmu --mmproj-url", _IMAGES, env="LLAMA_ARG_MMPROJ_URL"),
    note("--mmproj-auto --no-mmproj --no-mmproj-auto", _IMAGES, takes="", env="LLAMA_ARG_MMPROJ_AUTO"),
    note("--mmproj-offload --no-mmproj-offload", _IMAGES, takes="", env="LLAMA_ARG_MMPROJ_OFFLOAD"),
    note("-mmdev --mmproj-device", _IMAGES),
    note("--mtmd-batch-max-tokens", _IMAGES, env="LLAMA_ARG_MTMD_BATCH_MAX_TOKENS"),
    note("-tm --threads-mtmd --mtmd-kq-type", _IMAGES),
    refused("--image --audio --video", _IMAGES),
    note("--image-min-tokens", _IMAGES, env="LLAMA_ARG_IMAGE_MIN_TOKENS"),
    note("--image-max-tokens", _IMAGES, env="LLAMA_ARG_IMAGE_MAX_TOKENS"),
    note("--video-fps", _IMAGES, env="LLAMA_ARG_VIDEO_FPS"),
    note("--video-timestamp-interval", _IMAGES, env="LLAMA_ARG_VIDEO_TIMESTAMP_INTERVAL"),
    note("--video-ffmpeg-dir", _IMAGES, env="LLAMA_ARG_VIDEO_FFMPEG_DIR"),
    same("--pooling", "none, mean, cls, last; of GGUF files", env="LLAMA_ARG_POOLING"),
    refused("--attention", "this generates text, with causal attention", off="causal"),
    note(
        "--embedding --embeddings",
        "`serve` makes embeddings where the file or --pooling says how",
        takes="",
        env="LLAMA_ARG_EMBEDDINGS",
    ),
    refused("--rerank --reranking", "this generates text; nothing is ranked", takes="", env="LLAMA_ARG_RERANKING"),
    note("--embd-normalize", "embeddings have length 1", off="2"),
    note("--embd-output-format --embd-separator", "embeddings are not made"),
    *(
        note(names, _DRAFT, takes="", env=env)
        for names, env in (
            ("--spec-default --spec-autotune -mtp --multi-token-prediction -no-mtp --no-multi-token-prediction", ""),
            ("--spec-draft-cpu-moe -cmoed --cpu-moe-draft", "LLAMA_ARG_SPEC_DRAFT_CPU_MOE"),
            (
                "--spec-draft-backend-sampling --no-spec-draft-backend-sampling",
                "LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING",
            ),
        )
    ),
    *(
        note(names, _DRAFT, env=env)
        for names, env in (
            ("-hfd -hfrd --hf-repo-draft --spec-draft-hf", "LLAMA_ARG_SPEC_DRAFT_HF_REPO"),
            ("-ctkd --cache-type-k-draft --spec-draft-type-k", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K"),
            ("-ctvd --cache-type-v-draft --spec-draft-type-v", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V"),
            ("-ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl", "LLAMA_ARG_N_GPU_LAYERS_DRAFT"),
            ("-devd --device-draft --spec-draft-device", ""),
            ("-td --threads-draft --spec-draft-threads -tbd --threads-batch-draft --spec-draft-threads-batch", ""),
            ("-Cd --cpu-mask-draft --spec-draft-cpu-mask -Crd --cpu-range-draft --spec-draft-cpu-range", ""),
            ("--cpu-strict-draft --spec-draft-cpu-strict --prio-draft --spec-draft-prio", ""),
            ("--poll-draft --spec-draft-poll -Cbd --cpu-mask-batch-draft --spec-draft-cpu-mask-batch", ""),
            ("--cpu-strict-batch-draft --spec-draft-cpu-strict-batch", ""),
            ("--prio-batch-draft --spec-draft-prio-batch --poll-batch-draft --spec-draft-poll-batch", ""),
            ("-otd --override-tensor-draft --spec-draft-override-tensor", ""),
            ("-ncmoed --n-cpu-moe-draft --spec-draft-ncmoe --spec-draft-n-cpu-moe", "LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE"),
            ("--draft-p-min --spec-draft-p-min", "LLAMA_ARG_SPEC_DRAFT_P_MIN"),
            ("--draft-p-split --spec-draft-p-split -ps --p-split", "LLAMA_ARG_SPEC_DRAFT_P_SPLIT"),
            ("-cd --ctx-size-draft -draft --draft-params -mtprot --mtp-requantize-output-tensor", ""),
            ("--spec-type", "LLAMA_ARG_SPEC_TYPE"),
            ("--spec-synth-len", "LLAMA_ARG_SPEC_SYNTH_LEN"),
            ("--spec-synth-rates", "LLAMA_ARG_SPEC_SYNTH_RATES"),
            ("--spec-stage --spec-ckpt-mode --recurrent-ckpt-mode", ""),
            ("--suffix-pattern-len --suffix-max-depth --suffix-corpus", ""),
            ("--spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits", ""),
            ("--spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match", ""),
            ("--spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits", ""),
            ("--spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits", ""),
            ("--spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits", ""),
            ("-lcs --lookup-cache-static -lcd --lookup-cache-dynamic", ""),
        )
    ),
    same("-md --model-draft --spec-draft-model", env="LLAMA_ARG_SPEC_DRAFT_MODEL"),
    same("--draft --draft-n --draft-max", env="LLAMA_ARG_DRAFT_MAX"),
    same("--draft-min --draft-n-min", env="LLAMA_ARG_DRAFT_MIN"),
    same("--spec-draft-n-max", env="LLAMA_ARG_SPEC_DRAFT_N_MAX"),
    same("--spec-draft-n-min", env="LLAMA_ARG_SPEC_DRAFT_N_MIN"),
    note("--spec-replace", _DRAFT, takes="N..."),
)
