"""Which tiles the Triton kernels get: by a model in whole waves, or by a GPU's table. No kernel runs here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from subnet_kernels.backends.triton import configs, rules

BF16 = torch.bfloat16


def model_us(config, m, n, k, parts=1, on=rules.H200):
    return rules.product_seconds(config, m, n, k, parts, on) * 1e6


def test_the_model_counts_whole_waves_at_the_tiles_rate_and_the_traffic_of_parts():
    tile = configs.SCORE_GRADIENT[2][0]
    one_wave = 1024 * 2 * 128 * 128 / (0.85 * 788e12 / 132) * 1e6
    assert model_us(tile, 1024, 128 * 12, 128 * 11) == pytest.approx(one_wave)  # 132 tiles
    assert model_us(tile, 1024, 128 * 7, 128 * 19) == pytest.approx(2 * one_wave)  # 133
    assert model_us(tile, 1024, 128, 128, 4) == pytest.approx(one_wave / 4 + 4 * 8 * 128 * 128 / 4.3e12 * 1e6)


def test_tiles_that_leave_a_last_wave_half_empty_are_passed_over():
    config, parts = rules.fastest_score_gradient(BF16, 1024, 768, 3072, True, rules.H200)  # 144 tiles of 128x128
    assert (config.rows, config.columns, parts) != (128, 128, 1)
    best = model_us(config, 1024, 768, 3072, parts)
    assert best < 0.9 * model_us(configs.SCORE_GRADIENT[2][0], 1024, 768, 3072)
    config, parts = rules.fastest_score_gradient(BF16, 4096, 4096, 11008, True, rules.H200)
    assert (config.rows, config.columns, parts) == (128, 128, 1)
    config, parts = rules.fastest_score_gradient(BF16, 10240, 512, 128, True, rules.H200)
    assert parts > 1 and parts * -(-512 // config.rows) * -(-128 // config.columns) <= 132


def test_the_score_gradient_goes_to_the_vendor_where_the_product_outweighs_the_saved_bytes_and_always_in_fp32():
    assert rules.score_gradient(BF16, 1024, 4096, 11008, True, rules.H200) is not None
    assert rules.score_gradient(BF16, 65536, 4096, 11008, True, rules.H200) is None
    assert rules.score_gradient(torch.float32, 1024, 4096, 11008, True, rules.H200) is None
    for m in (64, 256, 1024):
        config, _ = rules.score_gradient(BF16, m, 768, 768, False, rules.H200)
        assert config in configs.SCORE_GRADIENT_SMALL[2]


def test_a_linear_step_weighs_what_the_score_gradient_does_and_takes_tiles_of_its_own(table):
    config, parts = rules.linear_step(BF16, 1024, 4096, 11008, True, rules.H200)
    assert config is configs.LINEAR_STEP[0] and parts == 1
    fused, vendor = model_us(config, 1024, 4096, 11008), 2 * 1024 * 4096 * 11008 / 788e6
    assert vendor < fused < vendor + 4 * 4096 * 11008 / 4.3e6 + 2  # slower, but it stores no product
    assert rules.linear_step(BF16, 4096, 4096, 11008, True, rules.H200) is None
    assert rules.fastest_linear_step(BF16, 4096, 4096, 11008, True, rules.H200) == (configs.LINEAR_STEP[0], 1)
    assert rules.linear_step(torch.float32, 1024, 4096, 11008, True, rules.H200) is None
    config, parts = rules.linear_step(BF16, 256, 512, 128, True, rules.H200)
    assert config in configs.LINEAR_STEP and parts == 1
    assert rules.fastest_linear_step(BF16, 10240, 512, 128, True, rules.H200)[1] > 1
    assert rules.linear_step(BF16, 64, 768, 768, False, rules.H200)[0] in configs.LINEAR_STEP_ODD
    tile = configs.Gemm(64, 64, 64, 4, 4, "")
    table(entry("score_gradient", 1024, 4096, 11008, 200.0, 100.0, tile))
    assert rules.linear_step(BF16, 1024, 4096, 11008, True, rules.H200) is None


def test_a_masked_product_takes_the_tile_that_holds_all_rows_unless_half_of_the_chip_would_be_empty():
    def columns(m, n, k, dtype=BF16, weight_dtype=BF16):
        return rules.masked_product(dtype, m, n, k, weight_dtype, rules.H200).columns

    assert [columns(m, 11008, 4096) for m in (1, 16, 17, 64, 65, 1000)] == [16, 16, 32, 64, 128, 128]
    assert columns(64, 768, 3072) == 16  # 6 programs of 128x64, 12 of 64x32, 48 of 64x16
    assert columns(1000, 11008, 4096, weight_dtype=torch.float32) == 64
    assert columns(1000, 11008, 4096, torch.float32, torch.float32) == 32


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes entries as the H200's table."""
    monkeypatch.setattr(rules, "TABLES", tmp_path)
    rules.forget()

    def write(*entries):
        rules.table_path("NVIDIA H200").write_text(json.dumps({"entries": list(entries)}))
        rules.forget()

    yield write
    rules.forget()


def entry(kernel, m, n, k, us, other_us, config, num_parts=1):
    tile = {name: value for name, value in asdict(config).items() if name != "reason"}
    return {"kernel": kernel, "dtype": "bfloat16", "m": m, "n": n, "k": k, "us": us, "other_us": other_us,
            "num_parts": num_parts, "config": tile}  # fmt: skip


def test_what_was_measured_on_this_gpu_wins_over_the_model_up_to_the_next_power_of_two_of_rows(table):
    tile = configs.Gemm(64, 64, 64, 4, 4, "")
    table(
        entry("score_gradient", 1024, 4096, 11008, 100.0, 200.0, tile, 3),
        entry("score_gradient", 256, 4096, 11008, 200.0, 100.0, tile),
        entry("masked_product", 64, 4096, 11008, 30.0, 60.0, tile),
        entry("masked_product", 256, 4096, 11008, 60.0, 30.0, tile),
    )
    for m in (513, 1024):
        config, parts = rules.score_gradient(BF16, m, 4096, 11008, True, rules.H200)
        assert (replace(config, reason=""), parts) == (tile, 3)
    assert rules.score_gradient(BF16, 200, 4096, 11008, True, rules.H200) is None
    assert rules.score_gradient(BF16, 1025, 4096, 11008, True, rules.H200)[0].rows == 128
    other_gpu = replace(rules.H200, name="NVIDIA A100")
    assert rules.score_gradient(BF16, 1024, 4096, 11008, True, other_gpu)[0].rows == 128
    fused = [m for m in (32, 33, 64, 200) if rules.fuses_product(BF16, m, 4096, 11008, rules.H200)]
    assert fused == [33, 64]  # 32 is another bucket, at 200 the other way was faster
    assert not rules.fuses_product(torch.float16, 64, 4096, 11008, rules.H200)


def test_a_damaged_table_is_named_and_not_half_read(table):
    table({"kernel": "score_gradient"})
    with pytest.raises(ValueError, match=r"nvidia-h200.json: not a table of tiles .* subnets bench --tune"):
        rules.score_gradient(BF16, 1024, 4096, 11008, True, rules.H200)


def test_every_shipped_table_can_be_read():
    for path in rules.TABLES.glob("*.json"):
        assert rules.table(json.loads(path.read_text())["device"]), path.name
