"""The check's own decoding, and how it sees what differs and what nothing wrote."""

import torch
from safetensors.torch import save_file
from torch import tensor

from . import stored
from .stored import Comparison, Loaded, Stored


def test_decoding():
    codes = tensor([[0x21] * 7 + [0x9F]], dtype=torch.uint8)  # 0.5, 1 seven times, then -6, -0.5
    scales = tensor([[2.0]]).to(torch.float8_e4m3fn)
    expected = [1.0, 2.0] * 7 + [-12.0, -1.0]
    assert stored.decoded(codes, scales, tensor(1.0)).tolist() == [expected]
    codes = torch.full((1, 32), 1.5).to(torch.float8_e4m3fn)
    assert stored.decoded(codes, tensor([[126]], dtype=torch.uint8), None).tolist() == [[0.75] * 32]
    assert stored.decoded(codes, tensor(2.0), None).tolist() == [[3.0] * 32]


def test_a_file_and_what_was_loaded_of_it(tmp_path):
    weight = torch.full((2, 16), 1.5)
    save_file(
        {
            "backbone.a.weight": weight.to(torch.float8_e4m3fn),
            "backbone.a.weight_scale": tensor(2.0),
            "backbone.a.input_scale": tensor(0.5),
            "backbone.b.weight": weight.to(torch.bfloat16),
            "backbone.b.k_scale": tensor(0.25),
            "backbone.D": tensor([1.0]),
            "mtp.c.weight": weight,
        },
        tmp_path / "model.safetensors",
    )
    file = Stored(tmp_path)
    assert file.modules(False) == ["backbone.a", "backbone.b"]
    assert file.modules(True) == ["mtp.c"]
    assert [file.algorithm(name) for name in file.modules(False)] == ["FP8", ""]
    assert [name for name, _ in file.others(False)] == ["backbone.D"]
    assert file.cache_scales(False) == {"backbone.b.k_scale": 0.25}
    right, wrong = Comparison(), Comparison()
    right.module(file, "backbone.a", Loaded("FP8", 2 * weight, 0.5))
    right.module(file, "backbone.b", Loaded("", torch.cat([weight, weight])))  # rows of a padded vocabulary
    assert not (right.algorithm_differs or right.values_differ or right.input_scales_differ)
    assert right.algorithms == {"FP8": 1, stored.PLAIN: 1}
    wrong.module(file, "backbone.a", Loaded("", weight, 1.0))
    wrong.module(file, "backbone.b", None)
    wrong.other("backbone.D", tensor([1.0]), tensor([2.0]))
    wrong.cache("backbone.b.k_scale", 0.25, None)
    assert wrong.algorithm_differs == [["backbone.a", "FP8", ""]]
    assert wrong.values_differ == [
        ["backbone.a", "FP8", "32 of 32 values"],
        ["backbone.b", "", "no such module"],
        ["backbone.D", "", "1 of 1 values"],
    ]
    assert wrong.input_scales_differ == [["backbone.a", 0.5, 1.0]]
    assert wrong.kv_scales_differ == [["backbone.b.k_scale", 0.25, None]]


def test_what_nothing_wrote_shows():
    def keep(name):
        return name.endswith("kept")

    models = []
    for byte in stored.FILLS:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        model[0].kept = torch.nn.Parameter(tensor([float(byte)]))
        assert stored.fill(model, byte, keep) == {"kept": 1}
        model[0].weight.data.fill_(3.0)
        model[0].bias.data[0] = 1.0
        models.append(model)
    assert stored.unwritten(*models, keep) == [["0.bias", [2], 4]]


def test_a_fill_shows_in_a_maximum():
    model = torch.nn.Linear(1, 1)
    stored.fill(model, stored.FILLS[1], lambda name: False)
    assert model.bias.item() > 1e38
