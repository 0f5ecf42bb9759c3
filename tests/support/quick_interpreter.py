"""Triton's interpreter at a third of its time: what it makes anew for each operation is made once.

It spends its time on Python objects: a kernel's block of numbers carries a tuple of its shape, whose type is made from
the types of its numbers at every operation. All of it depends on the shape alone. Nothing that is computed changes.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from mnv2_fused import backends

# Of which the source below was read; any other runs as it is.
KNOWN = "3.6."


def _options(checked):
    """The interpreter's options, with or without its check of every sum of integers in 64 bits: half of the time."""
    from triton.runtime import interpreter

    return replace(interpreter.interpreter_builder.options, sanitize_overflow=checked)


def check_overflow(monkeypatch):
    """Puts the check back, for a test of offsets; does nothing on a GPU."""
    if backends.triton_interpreted():
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.interpreter_builder, "options", _options(checked=True))


@contextmanager
def quick_interpreter():
    """Patches Triton's interpreter inside."""
    import triton

    if not triton.__version__.startswith(KNOWN):
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    patched = []

    def patch(owner, name, value):
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    originals = core.tuple.__init__, core.tuple.__getattr__, core.block_type.__init__, interpreter._get_np_dtype

    def tuple_init(self, args, type=None):
        if type is None:
            self.values = list(args)  # the type follows when somebody asks
        else:
            originals[0](self, args, type)

    def tuple_getattr(self, name):
        if name != "type":
            return originals[1](self, name)
        self.type = core._type_for_tuple_values(self.values)
        return self.type

    @cache
    def of_shape(shape):
        """What block_type and tensor keep of a shape: as numbers, the count, the text, as constants."""
        made = core.block_type.__new__(core.block_type)
        originals[2](made, core.float32, list(shape))
        constants = core.tuple([core.constexpr(size) for size in shape])
        return made.shape, made.numel, str(made.shape), constants, core.constexpr(made.numel)

    def block_type_init(self, element_ty, shape):
        sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        self.shape, self.numel, text, self.constants, self.constant_numel = of_shape(sizes)
        self.element_ty = element_ty
        self.name = f"<{text}, {element_ty}>"

    no_shape, one = core.tuple([]), core.constexpr(1)

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.constants, type.constant_numel) if type.is_block() else (no_shape, one)

    by_name = {}

    def np_dtype(of):
        element = of.element_ty if isinstance(of, core.block_type) else of
        if element.name not in by_name:
            by_name[element.name] = originals[3](element)
        return by_name[element.name]

    unpatched_call = interpreter.InterpretedFunction.__call__

    def call(self, *args, **options):
        """A helper of the kernel's own module: triton.language is patched by the kernel's call, once for all."""
        if self.fn.__module__.startswith("mnv2_fused."):
            return self.rewrite()(*args, **options)
        return unpatched_call(self, *args, **options)

    patch(interpreter.InterpretedFunction, "__call__", call)
    patch(core.tuple, "__init__", tuple_init)
    patch(core.tuple, "__getattr__", tuple_getattr)
    patch(core.block_type, "__init__", block_type_init)
    patch(core.tensor, "__init__", tensor_init)
    patch(interpreter, "_get_np_dtype", np_dtype)
    patch(interpreter.interpreter_builder, "options", _options(checked=False))
    yield
    for owner, name, value in reversed(patched):
        setattr(owner, name, value)
