"""The table of engines, what it says of plans, and the commands for serving."""

import json
import shlex
from functools import cache

import pytest
from support.places import DEMO, NANO, SUPER

from nemoquant import api
from nemoquant.layouts import ENGINES, RIGHT, serving
from nemoquant.layouts.engine_rows import BESIDE, EXPERTS, FAMILIES, LEAST, LINEAR, ORDER, ROWS
from nemoquant.layouts.engines import READERS, cautions, mixture, notes, outcome, table
from nemoquant.layouts.gpus import GPUS, SMS
from nemoquant.layouts.modelopt import FORMAT_OF, MIXED
from nemoquant.layouts.serving import Chat, commands
from nemoquant.model.roles import LINEAR_ROLES

VLLM, SGLANG, TENSORRT_LLM = ENGINES.values()
planned = cache(api.plan)


def test_every_row_is_of_the_tables_words() -> None:
    algorithms = {*FORMAT_OF, MIXED}
    for row in ROWS:
        assert row.engine in {*ENGINES.values(), *READERS}
        assert row.algorithm in algorithms
        assert row.part in {EXPERTS, LINEAR, BESIDE, *LINEAR_ROLES, "lm_head"}
        assert row.on.runs in ORDER
        assert row.on.source
        assert bool(row.on.since) == (row.on.runs in RIGHT)
        assert row.on.note or row.on.runs != "wrong"
        for sms in FAMILIES.values():
            assert set(sms) <= set(row.on.sms) or not set(sms) & set(row.on.sms), "a family is one case"
    assert LEAST.keys() == {(engine, name) for engine in ENGINES.values() for name in algorithms}
    assert {sm for sms in FAMILIES.values() for sm in sms} >= set(SMS)


def test_no_two_rows_say_different_things_of_one_case() -> None:
    cases = [(row.engine, row.algorithm, row.part, sm) for row in ROWS for sm in row.on.sms]
    assert len(cases) == len(set(cases))


# (preset, engine) -> how it runs on T4, A100, L40S, H100, B200, RTX 5090; LETTERS has what the letters mean
EXPECTED = {
    ("fp8", VLLM): "rwnnnn",
    ("fp8", SGLANG): "rrnnnn",
    ("fp8", TENSORRT_LLM): "rrnnnn",
    ("mxfp8", VLLM): "rwwwnw",
    ("mxfp8", SGLANG): "rrrrnr",
    ("mxfp8", TENSORRT_LLM): "rrrrrr",
    ("nvfp4", VLLM): "wwwwnn",
    ("nvfp4", SGLANG): "rwwwnn",
    ("nvfp4", TENSORRT_LLM): "rr?wnn",
    ("nvfp4-full", VLLM): "wwwwnn",
    ("nvfp4-full", SGLANG): "rwwwnn",
    ("nvfp4-full", TENSORRT_LLM): "rr?wnn",
    ("nvfp4-w4a16", VLLM): "wwwwww",
    ("nvfp4-w4a16", SGLANG): "rwwwww",
    ("nvfp4-w4a16", TENSORRT_LLM): "rwwwww",
    ("nvfp4-full-w4a16", VLLM): "wwwwww",
    ("nvfp4-full-w4a16", SGLANG): "rxxxxx",
    ("nvfp4-full-w4a16", TENSORRT_LLM): "rwwwww",
}
LETTERS = {"native": "n", "weights only": "w", "refused": "r", "wrong": "x", "not known": "?"}


@pytest.mark.parametrize("preset", sorted({preset for preset, _ in EXPECTED}))
def test_what_engines_do_with_a_preset(preset) -> None:
    file = mixture(planned(SUPER, preset))
    for engine in ENGINES.values():
        found = "".join(LETTERS[outcome(file, engine, sms[0]).runs] for sms in FAMILIES.values())
        assert found == EXPECTED[preset, engine], engine
        for sm in SMS:
            assert bool(outcome(file, engine, sm).since) == (
                outcome(file, engine, sm).runs in ("native", "weights only")
            )


def test_the_latest_version_of_all_parts_counts() -> None:
    file = mixture(planned(SUPER, "nvfp4"))
    assert outcome(file, VLLM, 100).since == "0.17.1", "FP8 parts alone need 0.12.0"
    assert outcome(file, TENSORRT_LLM, 90).since == "after June 2026", "FP8 parts alone need 1.3.0rc8"


def test_what_transformers_does_is_said() -> None:
    for preset in ("fp8", "mxfp8"):
        assert any("raw codes" in note for note in notes(mixture(planned(SUPER, preset))))
    (mixed,) = [note for note in notes(mixture(planned(SUPER, "nvfp4"))) if note.startswith("transformers")]
    assert "does not load" in mixed


def test_what_readers_of_other_kinds_do() -> None:
    """A file that lists its modules is what its modules are to them."""
    found = {
        preset: [note for note in notes(mixture(planned(SUPER, preset))) if note.startswith("llama.cpp")]
        for preset in ("fp8", "mxfp8", "nvfp4-full", "nvfp4-w4a16")
    }
    assert found["nvfp4-full"] == []
    assert [len(said) for said in found.values()] == [1, 1, 0, 1]
    assert "GGML_CUDA_MMQ_PREC=q8" in found["nvfp4-w4a16"][0]


def test_cautions_are_not_said_twice() -> None:
    plan = planned(SUPER, "nvfp4-full-w4a16")
    (caution,) = cautions(plan)
    assert caution.startswith(
        "40 mamba.in_proj modules are W4A16_NVFP4: SGLang 0.5.23 reads its global scale"
    )
    assert not any("global scale" in note for note in notes(mixture(plan)))


def test_a_row_for_each_family() -> None:
    plan = planned(SUPER, "nvfp4")
    found = table(mixture(plan), [SGLANG])
    assert [len(row) for row in found] == [2] * len(FAMILIES)
    assert found[0] == ("T4 (SM 75)", "refused")
    assert found[4] == ("B200, B300 (SM 100, 103)", "native, 0.5.9")


# Commands.


def by_engine(model, preset, gpu, **given):
    return {each.engine: each for each in commands(planned(model, preset), gpu, **given)}


def test_commands_for_super_on_two_gpus() -> None:
    found = by_engine(SUPER, "fp8", "h100", out="my out")
    assert found[VLLM].where == "vLLM 0.12.0 or later on 2 H100 (native)"
    assert found[VLLM].lines == [
        "vllm serve 'my out' --tensor-parallel-size 2 --enable-expert-parallel --kv-cache-dtype fp8 "
        "--mamba-ssm-cache-dtype float32 --speculative-config "
        """'{"method": "mtp", "num_speculative_tokens": 3}' --reasoning-parser nemotron_v3 """
        "--enable-auto-tool-choice --tool-call-parser qwen3_coder"
    ]
    assert found[SGLANG].lines == [
        "python -m sglang.launch_server --model-path 'my out' --tp-size 2 --ep-size 2 --kv-cache-dtype "
        "fp8_e4m3 --mamba-ssm-dtype float32 --speculative-algorithm EAGLE --speculative-num-steps 3 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4 --reasoning-parser nemotron_3 "
        "--tool-call-parser qwen3_coder"
    ]
    *made, end, command = found[TENSORRT_LLM].lines
    assert made == [
        "cat > trtllm.yaml <<'END'",
        'kv_cache_config: {"enable_block_reuse": false, "mamba_ssm_cache_dtype": "float32", "dtype": "fp8"}',
        'speculative_config: {"decoding_type": "MTP", "num_nextn_predict_layers": 3}',
    ]
    assert end == "END"
    assert command == (
        "trtllm-serve 'my out' --config trtllm.yaml --tp_size 2 --ep_size 2 --reasoning_parser nemotron-v3 "
        "--tool_parser qwen3_coder"
    )
    for each in found.values():
        assert shlex.split(each.lines[-1]) == list(each.argv)
        assert json.loads(json.dumps(each.to_json()))["command"] == list(each.argv)


def test_the_kernel_for_experts_on_b200_is_named() -> None:
    argv = by_engine(NANO, "nvfp4", "b200")[VLLM].argv
    assert argv[argv.index("--moe-backend") + 1] == "flashinfer_cutlass"
    assert json.loads(by_engine(SUPER, "nvfp4", "b200")[VLLM].argv[-6])["moe_backend"] == "triton"
    assert "--moe-backend" not in by_engine(NANO, "nvfp4", "rtx5090")[VLLM].argv
    assert "--moe-backend" not in by_engine(NANO, "fp8", "b200")[VLLM].argv


def test_where_there_is_no_command(monkeypatch) -> None:
    found = by_engine(SUPER, "nvfp4-full-w4a16", "b200")
    assert found[SGLANG].argv == () and found[SGLANG].lines == []
    assert found[SGLANG].where.startswith("SGLang on B200: wrong; SGLang 0.5.23 reads")
    small = by_engine(SUPER, "nvfp4-w4a16", "t4")
    assert small[SGLANG].where == "SGLang on T4: refused, it asks for SM 80 or later"
    assert small[VLLM].where.startswith("vLLM 0.33.0 or later on 8 T4")
    assert by_engine(SUPER, "mxfp8", "rtx4090")[VLLM].where.startswith("vLLM 0.23.0 or later on 8 RTX 4090")
    monkeypatch.setattr(serving, "SPLITS", (1,))
    large = by_engine(SUPER, "fp8", "h100")[VLLM]
    assert large.argv == ()
    assert large.where == "vLLM: 131.27 GB do not fit into 1 H100 of 80 GB"


def test_what_a_model_lacks_is_not_in_its_command() -> None:
    (vllm, sglang, tensorrt_llm) = commands(planned(DEMO, "nvfp4-w4a16"), chat=Chat.of("{{ messages }}"))
    assert vllm.argv == (
        *("vllm", "serve", "/path/to/this/folder", "--mamba-ssm-cache-dtype", "float32"),
        *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'),
    )
    assert "H100" in vllm.where
    assert not {"--kv-cache-dtype", "--reasoning-parser", "--tool-call-parser", "--tp-size"} & {*sglang.argv}
    assert '"dtype"' not in tensorrt_llm.files["trtllm.yaml"]
    (vllm, *_) = commands(planned(DEMO, "nvfp4-w4a16"), "t4")
    assert vllm.argv[3:5] == ("--dtype", "half")


def test_the_usual_gpu_has_the_formats() -> None:
    for preset, gpu in {"fp8": "H100", "nvfp4": "B200", "mxfp8": "B200", "nvfp4-w4a16": "H100"}.items():
        assert gpu in commands(planned(DEMO, preset))[0].where
    assert Chat.of("<think><function=") == (True, True)


def test_gpus_are_split_as_engines_divide_the_model() -> None:
    """Super has 8 groups and 2 KV heads: 1, 2, 4 or 8 GPUs; memory decides."""
    sizes = {gpu: by_engine(SUPER, "fp8", gpu)[VLLM].where for gpu in GPUS}
    assert "on 2 H100" in sizes["h100"] and "on H200" not in sizes["h200"].replace("on 2 H200", "")
    assert "on 4 L40S" in sizes["l40s"] and "on 8 RTX 4090" in sizes["rtx4090"]
    assert "on B300" in sizes["b300"]


def test_a_quantized_cache_alone_runs_everywhere(tmp_path) -> None:
    recipe = tmp_path / "none.yaml"
    recipe.write_text("name: none\nsummary: s\nkv_cache: fp8\nrules:\n- {roles: ['*'], format: source}\n")
    (vllm, *_) = commands(api.plan(DEMO, recipe))
    assert vllm.where == "vLLM on H100 (native)"
