"""Whole models, random weights: every block fused or skipped with a reason, results within the rule, names kept."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from support.source_tree import BENCHMARKS, make_importable
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from mnv2_fused import FusedBlock, fuse, report, unfuse
from mnv2_fused.testing import agreement, fit_batch_norm, perturb_batch_norm, threads

make_importable(BENCHMARKS)

import families  # noqa: E402
from zoo import ZOO, build, detector, tensors_in  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_whole_model(name):
    entry = ZOO[name]
    library = {"smp": "segmentation_models_pytorch"}.get(name.split()[0], name.split()[0])
    pytest.importorskip(library)
    model = build(entry, (64, 64), images=16)
    fused = fuse(model)
    rows = report(fused)
    assert [b.backend for b in rows.fused] == ["cpu"] * entry.blocks
    assert all(b.reason is None for b in rows.fused)
    assert len(rows.skipped) == len(entry.skipped)
    assert all(part in b.reason for part, b in zip(entry.skipped, rows.skipped, strict=True))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(fused) is type(model) or issubclass(type(fused), type(model))

    # Many images: a network amplifies some direction of a result's error most, and where eager's happens to have
    # nothing of it, one image would hold fused to that.
    x = torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [list(tensors_in(m(x))) for m in (fused, model)]
        truth = list(tensors_in(copy.deepcopy(model).double()(x.double())))
    assert len(truth) == len(results[0]) > 0
    for ours, theirs, reference in zip(*results, truth, strict=True):
        found = agreement(ours, theirs, reference)
        assert found.ok, found
    assert truth[-1].std() > 0
    with torch.no_grad():
        for ours, theirs in zip(tensors_in(unfuse(fused)(x)), results[1], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_features_are_extracted_with_fused_blocks_as_leaves(name):
    model = perturb_batch_norm(getattr(models, name)(weights=None)).eval()
    fit_batch_norm(model, torch.randn(4, 3, 64, 64))
    options = {"return_nodes": ["features.4", "features.7"], "tracer_kwargs": {"leaf_modules": [FusedBlock]}}
    extractor = create_feature_extractor(fuse(model), **options)
    assert sum(isinstance(m, FusedBlock) for m in extractor.modules()) >= 7
    expected = create_feature_extractor(model, options["return_nodes"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        truth = copy.deepcopy(expected).double()(x.double())
        for ours, theirs, reference in zip(extractor(x).values(), expected(x).values(), truth.values(), strict=True):
            found = agreement(ours, theirs, reference)
            assert found.ok, found


def test_bytes_never_written_of_a_model_beyond_mobilenet_v2():
    model = models.mobilenet_v3_small(num_classes=10).eval()
    result = report(fuse(model), (1, 3, 64, 64))
    first = result.blocks[1]  # 16 -> 72 at 16x16, stride 2
    assert str(first.spec).startswith("16 -> 72 -> 24, stride 2")
    assert first.bytes_never_written == 72 * (16 * 16 + 8 * 8) * 4
    stem, head, *classifier = result.layers
    assert (stem.name, stem.bytes_never_written) == ("features.0", 16 * 32 * 32 * 4)
    assert (head.name, head.bytes_never_written) == ("features.12", 576 * 2 * 2 * 4)
    assert [row.name for row in classifier] == ["classifier.0", "classifier.3"]
    rows = *result.blocks, stem, head
    assert result.bytes_never_written == sum(row.bytes_never_written for row in rows)


def test_the_page_is_what_was_measured():
    """docs/families.md comes from the kept results, which hold every model of the zoo, each within the rule."""
    content = json.loads(families.RESULTS.read_text())
    assert families.PAGE.read_text() == families.page(content), "run: make families"
    rows = [families.Row(**row) for row in content["models"]]
    assert [row.model for row in rows] == list(ZOO)
    for row in rows:
        entry = ZOO[row.model]
        assert (row.fused, tuple(row.size)) == (entry.blocks, entry.size)
        assert sum(row.skipped.values()) == len(entry.skipped)
        assert row.error <= row.limit


def test_a_wrong_model_is_not_timed(monkeypatch):
    def wrong(model):
        model = copy.deepcopy(model)
        model.classifier[-1].bias.data += 1
        return model

    monkeypatch.setattr(families, "fuse", wrong)
    with pytest.raises(RuntimeError, match="is wrong, so there is nothing to time"):
        families.measure("a model", ZOO["torchvision mobilenet_v3_small"], seconds=0.1)


@pytest.mark.slow
def test_the_table_of_one_model(capsys):
    assert families.main(["--only", "mobilenet_v3_small", "--seconds", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| mnv2_fused mobilenet_v3_small | 224 | 11 | 0 | ") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_whole_detector_finds_the_same_boxes(name):
    """In float64, where no rounding decides which of two boxes is first."""
    torch.manual_seed(0)
    model = perturb_batch_norm(detector(name)).eval()
    fit_batch_norm(model.backbone, torch.randn(4, 3, 64, 64))
    model = model.double()
    images = [torch.rand(3, 200, 260, dtype=torch.float64), torch.rand(3, 150, 90, dtype=torch.float64)]
    with torch.no_grad():
        found, expected = fuse(model)(images), model(images)
    assert sum(len(one["boxes"]) for one in expected) > 10
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
