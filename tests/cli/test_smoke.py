from click.testing import CliRunner

from nemoquant.cli import main


def test_quantize_and_verify(source, token_rows, tmp_path):
    for preset in ("fp8", "fp8-published", "nvfp4", "nvfp4-full", "nvfp4-w4a16"):
        out = tmp_path / preset
        made = CliRunner().invoke(main, ["quantize", str(source), str(out), "--recipe", preset, "--calib", str(token_rows)])
        assert made.exit_code == 0, made.output
        checked = CliRunner().invoke(main, ["verify", str(out), "--against", str(source)])
        assert checked.exit_code == 0, checked.output
