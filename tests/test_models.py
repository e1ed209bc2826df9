"""The built-in models have the sizes of their papers, and one dtype decides what they compute in."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_train import UserError, config_fields, start_devices
from parallel_train import config as config_lib
from parallel_train.forward import check_model_and_loss
from parallel_train.models.vit import sin_cos_positions
from parallel_train.state import abstract_state, create_model, eval_flags, takes_train

start_devices(8)

FLOAT32 = jnp.dtype('float32')
IMAGENET = ((224, 224, 3), 1000)
CIFAR = ((32, 32, 3), 10)
FASHION = ((28, 28, 1), 10)
TEXT = ((128,), 256)


def wide_resnet(depth: int, widening: int, classes: int = 10) -> int:
    """Returns the parameters of WRN-depth-widening, from table 1 of Zagoruyko & Komodakis 2016."""
    count, before = 3 * 9 * 16, 16
    for width in (16 * widening, 32 * widening, 64 * widening):
        for _ in range((depth - 4) // 6):
            norms = 2 * before + 2 * width
            count += (
                norms + 9 * before * width + 9 * width * width + (before * width if before != width else 0)
            )
            before = width
    return count + 2 * before + before * classes + classes


# Counts of torchvision (ResNets), of the paper's models for CIFAR-10 (WRN: 36.5 and 8.9 million), of the
# guide (CNN), of the layers (`resnet_small`). ViTs as timm's, without class token (width) and learned
# positions (197 × width). The
# transformer from its sizes: embedding, positions, four blocks of 12 × width² with 13 × width biases and
# norms, the last norm.
SIZES = {
    'cnn': (FASHION, 824_458),
    'fast_net': (FASHION, 375_658),
    'wide_resnet_16_2': (FASHION, 691_386),
    'resnet_small': (FASHION, 863_986),
    'resnet18': (IMAGENET, 11_689_512),
    'resnet34': (IMAGENET, 21_797_672),
    'resnet50': (IMAGENET, 25_557_032),
    'resnet101': (IMAGENET, 44_549_160),
    'wide_resnet_28_10': (CIFAR, wide_resnet(28, 10)),
    'wide_resnet_40_4': (CIFAR, wide_resnet(40, 4)),
    'vit_ti16': (IMAGENET, 5_717_416 - 198 * 192),
    'vit_s16': (IMAGENET, 22_050_664 - 198 * 384),
    'vit_b16': (IMAGENET, 86_567_656 - 198 * 768),
    'transformer_small': (TEXT, (256 + 128) * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128),
}
assert (wide_resnet(28, 10), wide_resnet(40, 4)) == (36_479_194, 8_949_210)


def make_config(model: str, dtype: str = 'float32', data: Any = IMAGENET) -> Any:
    shape, classes = data
    return config_lib.complete(
        config_lib.Config({'model': model, 'dtype': dtype, 'input_shape': shape, 'num_classes': classes})
    )


def data_of(model: str) -> Any:
    return SIZES[model][0] if model in SIZES else FASHION


def products(jaxpr: Any) -> list[Any]:
    """Returns the equations of a program, nested ones too, that are convolutions or matrix products."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ('conv_general_dilated', 'dot_general'):
            found.append(equation)
        for parameter in equation.params.values():
            if hasattr(parameter, 'jaxpr'):
                found += products(parameter.jaxpr)
    return found


@pytest.mark.parametrize('model', SIZES)
def test_parameter_counts(model: str) -> None:
    data, count = SIZES[model]
    params = abstract_state(make_config(model, data=data), 0.1).params
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == count


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('model', config_fields.BUILT_IN_MODELS)
def test_dtype_is_that_of_products_alone(model: str, dtype: str) -> None:
    """Parameters, statistics, gradients and logits are float32; the products are what the config says."""
    config = make_config(model, dtype, data_of(model))
    check_model_and_loss(config)
    state, module = abstract_state(config, 0.1), create_model(config)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    assert {x.dtype for x in jax.tree.leaves((variables, state.opt_state)) if x.ndim} == {FLOAT32}
    tokens = len(config.input_shape) == 1
    images = jax.ShapeDtypeStruct((2, *config.input_shape), jnp.int32 if tokens else jnp.float32)

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return module.apply(variables, images, **eval_flags(module))

    logits = jax.eval_shape(apply, variables, images)
    assert logits.dtype == FLOAT32
    assert logits.shape == (2, *(config.input_shape if tokens else ()), config.num_classes)
    found = products(jax.make_jaxpr(apply)(variables, images).jaxpr)
    *before, head = [
        equation.invars[0].aval.dtype for equation in found
    ]  # the last layer gives the logits, in float32
    assert head == FLOAT32 and len(before) >= 3 and set(before) == {jnp.dtype(dtype)}


@pytest.mark.slow
@pytest.mark.parametrize('model', ['resnet18', 'vit_s16'])
def test_bfloat16_computes_about_the_same(model: str) -> None:
    config = {dtype: make_config(model, dtype, CIFAR) for dtype in ('float32', 'bfloat16')}
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    models = {dtype: create_model(c) for dtype, c in config.items()}
    flags = {'train': True} if takes_train(models['float32']) else {}

    @jax.jit
    def all_logits(key: jax.Array) -> dict[str, jax.Array]:
        variables = dict(models['float32'].init(key, images, **flags))
        # The head of ViT and the last scales of the blocks start at 0, which would hide most of the model.
        variables['params'] = jax.tree.map(lambda p: jnp.where(p.any(), p, 0.1), variables['params'])
        return {
            dtype: m.apply(variables, images, **flags, mutable=['batch_stats'])[0]
            for dtype, m in models.items()
        }

    logits = all_logits(jax.random.key(0))
    exact = logits['float32']
    assert float(jnp.std(exact)) > 0
    # bfloat16 keeps 8 bits: a relative 2^-8 a layer, over tens of layers, in the norm of the logits.
    difference = jnp.linalg.norm(exact - logits['bfloat16']) / jnp.linalg.norm(exact)
    assert 0 < float(difference) < 0.1


@pytest.mark.parametrize(
    ('model', 'kind', 'count', 'last'),
    [
        ('resnet18', 'BasicBlock', 2 + 2 + 2 + 2, 'BatchNorm_1'),
        ('resnet34', 'BasicBlock', 3 + 4 + 6 + 3, 'BatchNorm_1'),
        ('resnet50', 'BottleneckBlock', 3 + 4 + 6 + 3, 'BatchNorm_2'),
        ('resnet101', 'BottleneckBlock', 3 + 4 + 23 + 3, 'BatchNorm_2'),
    ],
)
def test_a_block_of_a_resnet_starts_as_the_identity(model: str, kind: str, count: int, last: str) -> None:
    """Goyal et al. 2017, section 5.1: the last BatchNorm scale of each block is 0 at first, others are 1."""
    module = create_model(make_config(model, data=CIFAR))

    @jax.jit
    def scales(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
        params = module.init(key, jnp.ones((1, 32, 32, 3)))['params']
        return {
            name: {norm: block[norm]['scale'] for norm in block if norm.startswith('BatchNorm')}
            for name, block in params.items()
            if name.startswith(kind)
        }

    blocks = scales(jax.random.key(0))
    assert len(blocks) == count
    for block in blocks.values():
        assert not np.any(block.pop(last))
        # The one after the last is that of the projection around the block.
        assert len(block) >= int(last[-1]) and all(np.all(scale == 1) for scale in block.values())


def test_the_stride_of_a_bottleneck_is_in_its_3x3() -> None:
    """Version 1.5: 4.09 GMAC an image (torchvision), where the stride in the 1×1 gives 3.8."""
    config = make_config('resnet50')
    module, state = create_model(config), abstract_state(config, 0.1)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, images).jaxpr
    multiplications = 0
    for equation in products(jaxpr):
        if equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape  # height, width, in, out
            places = equation.outvars[0].aval.shape[1:3]
            multiplications += math.prod(kernel) * math.prod(places)
    assert multiplications + 2048 * 1000 == 4_089_184_256


def test_positions_are_those_of_the_paper() -> None:
    positions = sin_cos_positions(2, 3, 8)
    assert positions.shape == (6, 8) and positions.dtype == np.float32
    # Row 1, column 2, by hand: wavelengths 2π and 2π·10,000.
    expected = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    expected += [math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]
    np.testing.assert_allclose(positions[5], expected, rtol=1e-6)


def test_a_model_without_dtype_is_not_silently_float32() -> None:
    with pytest.raises(UserError, match=r"config.dtype='bfloat16'.*no field dtype"):
        create_model(make_config('tests.models_for_tests:Linear', 'bfloat16', FASHION))


@pytest.mark.parametrize(
    'path', ['os:abort', 'collections:OrderedDict', 'parallel_train.config_fields:OPTIMIZERS']
)
def test_only_what_can_make_models_is_called(path: str) -> None:
    """A path may come from a workdir's config; `os.abort`, called, would end these tests."""
    with pytest.raises(UserError, match=f'config.model={path!r}: must name a Linen module class'):
        create_model(make_config(path, data=FASHION))
