"""Small whole models, what tests of sequences ask of them, and modules through torch.jit.script."""

import copy
from functools import cache

import torch
from torch import nn
from torchvision.models.mobilenetv2 import MobileNetV2

from mnv2_fused import fuse, unfuse
from mnv2_fused.encoding import LayerKind
from mnv2_fused.testing import fit_batch_norm, perturb_batch_norm

from .inputs import image

B, BW, STEM, HEAD, POOLED, LINEAR = (
    LayerKind.BLOCK,
    LayerKind.BLOCK_WITHOUT_EXPAND,
    LayerKind.STEM_AND_BLOCK,
    LayerKind.POINTWISE,
    LayerKind.POOLED,
    LayerKind.LINEAR,
)
WHOLE = [STEM, B, B, B, POOLED, LINEAR]


@cache
def fitted(width=None):
    """torchvision's model with statistics that make its result depend on its input; a small one without a width."""
    torch.manual_seed(0)
    small = {"inverted_residual_setting": [[1, 8, 1, 1], [3, 16, 2, 2], [3, 24, 1, 1]]}
    model = MobileNetV2(num_classes=10, **({"width_mult": width} if width else small))
    nn.init.normal_(model.classifier[1].bias, std=0.02)
    return fit_batch_norm(model.eval(), torch.randn(8, 3, 64, 64))


def fused_model():
    return fuse(fitted())


def make_x(batch=2, dtype=torch.float32):
    return image(batch, 3, 33, 40, dtype=dtype)


def near(y, expected):
    return y.shape == expected.shape and (y - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1)


MAP_ONLY = [[STEM, B, B, B, HEAD]]


def other_state():
    return perturb_batch_norm(copy.deepcopy(fitted()), seed=9).state_dict()


def calls_of(model, x, ran):
    """The op's calls while ``model`` runs, whose result must agree."""
    ran.clear()
    y = model(x)
    calls = list(ran)
    assert near(y, unfuse(model)(x))
    return calls


def ahead_of_time(program, path):
    """A package of an exported program by AOTInductor, in two thirds of the time that its defaults take."""
    options = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def scripted(make):
    """``make()`` through torch.jit.script, which knows builtins by id(): a tuple may have that of one long gone."""
    made, builtins = [], torch.jit._builtins._get_builtin_table()

    def mistaken():
        values = (value for module in made[-1].modules() for value in vars(module).values())
        return any(isinstance(value, list | tuple) and id(value) in builtins for value in values)

    while not made or mistaken():
        made.append(make())  # all are kept, so that the next ones have other ids
    return torch.jit.script(made[-1])
