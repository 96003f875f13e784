"""What the compilers made of the kernels, run instruction by instruction: kernels/ptx.py runs the PTX, without a GPU.

The PTX is that of the CUDA kernels which the build put into the library for the newest architecture, what nvcc makes of
them for an older one, and what Triton compiles at a launch. Steps, tables and arguments are the optimizers' own.
"""

import functools
import importlib.util
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ptx
import pytest
import torch
from reference import METHODS, build_optimizer, second_side
from reference.scripted import (
    assert_same_rounding,
    bits,
    copies,
    like,
    noise,
    random_gradients,
    scripted_steps,
)

import fastsam
from fastsam.kernels import cuda
from fastsam.kernels import torch as specification
from fastsam.kernels import triton as triton_backend

ROOT = Path(__file__).parents[2]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
POINTED = dict(zip((*DTYPES, torch.int32, torch.int64), ("fp32", "fp64", "bf16", "fp16", "i32", "i64"), strict=True))

#: Which of a launch's tensors each pass writes, besides weights; in the order of fastsam/kernels/launches.py.
WRITES = {
    "gram": (4, 5, 6),
    "climb": (3, 5),
    "descend_sgd": (5, 8, 10),
    "descend_adam": (5, 8, 10, 11, 12, 13),
    "restore": (),
}


class DeviceCode:
    """A backend whose launches the interpreter of PTX runs; of ``broken_pass`` what ``broken`` makes of its text."""

    backend = None

    def __init__(self, monkeypatch):
        self.launched, self.sums, self.expected_sums = set(), [], []
        gram = specification.gram

        def noted(space, ascent):
            sums = gram(space, ascent)
            if any(g is not None and g.numel() for g in space.gradients):  # else nothing is launched
                self.expected_sums.append(sums.clone())
            return sums

        monkeypatch.setattr(specification, "gram", noted)
        self.broken_pass = self.broken = self.resident = None
        self.order = range  # of the blocks; `resident` of them run at a time

    def run(self, name, text, entry, arguments, blocks, threads, space, layout, tensors, shared=0):
        given = [(t, i in WRITES[name]) for i, t in enumerate(tensors)] + [(p, name != "gram") for p in space.params]
        given += [(t, False) for t in (layout.rows, layout.chunks, *space.gradients)]
        regions = [(t.data_ptr(), t.numel() * t.element_size(), writable) for t, writable in given if t is not None]
        if name == self.broken_pass:
            begin = text.index("{", text.index(f".entry {entry}("))
            end = text.index("\n}", begin)
            text = text[:begin] + self.broken(text[begin:end]) + text[end:]
        ptx.run(parsed(text, entry), arguments, blocks, threads, regions, shared, self.order(blocks), self.resident)
        self.launched.add(name)
        if name == "gram":
            self.sums.append(tensors[6].clone())


parsed = functools.cache(ptx.Kernel)


class Cuda(DeviceCode):
    """The library's own PTX, that of the newest architecture it was built for."""

    backend = "cuda"

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        if cuda._cuda is None:
            pytest.skip(f"backend 'cuda': {cuda.unavailable()}")
        from test_cuda_machine_code import WEIGHTS, kernel_of

        self.text = self.compiled()
        self.entries = {kernel_of(entry): entry for entry in re.findall(r"\.entry (\w+)\(", self.text)}
        self.weights = dict(zip(DTYPES, WEIGHTS.values(), strict=True))
        monkeypatch.setenv("FASTSAM_CUDA_ON_HOST", "1")  # for CPU tensors to be served
        monkeypatch.setattr(cuda, "launch", self.launch)

    def compiled(self):
        from test_cuda_machine_code import cuobjdump

        return cuobjdump("-ptx")

    def launch(self, name, space, layout, tensors, **flags):
        """With the structs of csrc/cuda/kernels.h."""
        from test_cuda_machine_code import NARROW

        weights, mixed = self.weights[space.dtype], set(space.gradient_dtypes) != {space.dtype}
        narrow = NARROW if space.state_dtype != space.dtype else ""
        if name == "restore":  # by size alone
            weights, mixed = "bfloat16" if space.dtype.itemsize == 2 else weights, False
        groups, *others = tensors
        descends = name.startswith("descend")
        ordered = tensors
        if descends:  # between what both descents have, and what is one's own, is the size of the averages
            ordered = [*others[:9], bool(narrow), groups, *others[9:]]
        arguments = struct.pack(
            f"<QQii{len(ordered)}Q" + "?7x" * len(flags),
            layout.rows.data_ptr(),
            layout.chunks.data_ptr(),
            len(layout.rows),
            layout.programs,
            *(int(t) if isinstance(t, bool) else 0 if t is None else t.data_ptr() for t in ordered),
            *flags.values(),
        )
        blocks = cuda._cuda.gram_blocks(layout.programs) if name == "gram" else layout.programs
        mixture = " with a mixture" if descends and others[5] is not None else ""
        narrow = narrow if mixture or name in ("gram", "climb") else ""
        entry = self.entries[name + mixture + narrow, weights, mixed]
        self.run(name, self.text, entry, [arguments], blocks, cuda._cuda.THREADS, space, layout, tensors)


class OlderCuda(Cuda):
    """What the same compiler makes of the sources for sm_80, with the flags of the build."""

    @staticmethod
    @functools.cache
    def compiled():
        spec = importlib.util.spec_from_file_location("fastsam_setup", ROOT / "setup.py")
        setup = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        try:
            command, _ = setup.cuda_toolchain().compile.split(" -gencode", 1)
        except setup.NotBuilt as reason:
            pytest.skip(str(reason))
        command = [*shlex.split(command), "-arch=compute_80", "-ptx"]
        with tempfile.TemporaryDirectory() as folder:
            for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
                subprocess.run([*command, source, "-o", f"{folder}/{source.stem}.ptx"], capture_output=True, check=True)
            return "\n".join(path.read_text() for path in Path(folder).glob("*.ptx"))


class Triton(DeviceCode):
    """What Triton compiles for sm_90 at a launch with such arguments."""

    backend, architecture = "triton", 90

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("nothing is compiled under TRITON_INTERPRET=1")
        self.kernels, self.own_launch = triton_backend._kernels, triton_backend.launch
        monkeypatch.setattr(triton_backend, "_kernels", {name: At(self, name) for name in self.kernels})
        monkeypatch.setattr(triton_backend, "launch", self.launch)

    def launch(self, name, space, layout, tensors, **flags):
        self.given = space, layout, tensors
        self.own_launch(name, space, layout, tensors, **flags)

    def call(self, name, blocks, *arguments, num_warps, enable_fp_fusion, **constants):
        kernel = self.kernels[name]
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        constants |= {n: None for n, argument in bound.items() if argument is None}
        signature = {n: "constexpr" if n in constants else "i32" for n in kernel.arg_names}
        signature |= {n: f"*{POINTED[t.dtype]}" for n, t in bound.items() if isinstance(t, torch.Tensor)}
        numbers = {n: getattr(a, "data_ptr", lambda a=a: a)() for n, a in bound.items() if a is not None}
        aligned = tuple(i for i, n in enumerate(bound) if signature[n][0] == "*" and numbers[n] % 16 == 0)
        options = ("num_warps", num_warps), ("enable_fp_fusion", enable_fp_fusion)
        signature, constants = tuple(signature.items()), tuple(constants.items())
        code = self.compiled(self.architecture, kernel, signature, constants, aligned, options)
        threads, shared = 32 * num_warps, code.metadata.shared
        self.run(name, code.asm["ptx"], name, numbers.values(), blocks, threads, *self.given, shared)

    @staticmethod
    @functools.cache
    def compiled(architecture, kernel, signature, constants, aligned, options):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        divisible = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(kernel, dict(signature), dict(constants), divisible)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))


class NewerTriton(Triton):
    """For sm_100, which has instructions for pairs of floats."""

    architecture = 100


class At:
    """In a kernel's place: ``kernel[grid](*arguments, **constants)``."""

    def __init__(self, code, name):
        self.code, self.name = code, name

    def __getitem__(self, grid):
        return functools.partial(self.code.call, self.name, *grid)


@pytest.fixture(params=[Cuda, Triton], ids=["cuda", "triton"])
def code(request, monkeypatch):
    return request.param(monkeypatch)


def some_tensors(dtype):
    """The longest is two chunks, the second without a whole block; then neighbours in memory, none at its beginning."""
    buffer = noise((3000,), 5, dtype)
    single = [noise(s, 100 + i, dtype) for i, s in enumerate([(1,), (17,), (0,), (), (9001,), (5, 7)])]
    return [*single, buffer[1:1004].view(17, 59), buffer[1004:1009], buffer[1101:2901]]


def after_steps(
    backend, method, base, dtype, tensors=some_tensors, edit=lambda passes: passes, groups=lambda p: p, steps=2
):
    """The weights after each pass, and at last the optimizer's state."""
    params = [torch.nn.Parameter(t) for t in tensors(dtype)]
    optimizer = build_optimizer(method, base, groups(params), backend)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.02 for i, p in enumerate(params)]
    passes = edit([random_gradients(params, 1000 * k) for k in range(2 * steps)])
    seen = scripted_steps(optimizer, params, passes)
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    # a NaN marks what a kernel has not written yet
    return [*seen, [torch.where(x.isnan(), 0, x) for x in states if isinstance(x, torch.Tensor)]]


def compare(code, method, base, dtype, *args, **kwargs):
    actual = after_steps(code.backend, method, base, dtype, *args, **kwargs)
    expected = after_steps("torch", method, base, dtype, *args, **kwargs)
    assert_same_rounding(actual, expected, dtype)
    for found, sums in zip(code.sums, code.expected_sums, strict=True):
        most = float(sums[0] * sums[2]) ** 0.5  # of <d,v>, in which much may cancel
        torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-5 * most)
    assert code.launched == {"gram", "climb", "descend_adam" if "Adam" in base else "descend_sgd"}


CASES = [
    ("SAM", "SGD momentum", torch.float32),
    ("SAM", "AdamW", torch.bfloat16),
    ("SAM", "SGD", torch.float64),
    ("ASAM", "AdamW", torch.float32),
    ("ASAM", "SGD dampening", torch.float16),
    ("F-SAM sigma=0.5 lmbda=0.9", "SGD nesterov", torch.bfloat16),
    ("F-SAM sigma=0.5 lmbda=0.9", "Adam", torch.float64),
    ("F-SAM sigma=0.5 lmbda=0.9", "AdamW maximize", torch.float32),
    ("Eigen-SAM given v", "SGD momentum", torch.float64),
    ("Eigen-SAM given v", "Adam", torch.float16),
    ("adaptive Eigen-SAM given v", "SGD maximize", torch.float32),
    ("F-SAM + Eigen-SAM given v", "SGD dampening", torch.float32),
]


@pytest.mark.parametrize(("method", "base", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_device_code_equals_the_specification(code, method, base, dtype):
    compare(code, method, base, dtype)


@pytest.mark.parametrize(("method", "base", "dtype"), CASES[4:8], ids=lambda x: str(x).removeprefix("torch."))
def test_pairs_of_floats(monkeypatch, method, base, dtype):
    compare(NewerTriton(monkeypatch), method, base, dtype)


@pytest.mark.parametrize(
    ("compiled", "method", "base", "dtype"),
    [*((Cuda, *case) for case in CASES[1::2]), *((OlderCuda, *case) for case in CASES[::2])],
    ids=lambda x: getattr(x, "__name__", str(x).removeprefix("torch.")),
)
def test_bits_are_those_of_the_same_source_compiled_for_this_processor(monkeypatch, compiled, method, base, dtype):
    code = compiled(monkeypatch)
    actual = after_steps("cuda", method, base, dtype)
    monkeypatch.undo()
    monkeypatch.setenv("FASTSAM_CUDA_ON_HOST", "1")
    expected = after_steps("cuda", method, base, dtype)
    assert code.launched
    assert list(map(bits, actual)) == list(map(bits, expected))


@pytest.mark.parametrize(
    ("base", "some", "others"),
    [("SGD momentum", {"momentum": 0.0}, {"nesterov": True}), ("AdamW", {"eps": 1e-3}, {"maximize": True})],
    ids=["SGD", "AdamW"],
)
def test_missing_gradients_and_several_groups(code, base, some, others):
    def missing(passes):
        for i, k in ((0, 0), (3, 1), (4, 3), (7, 1), *((5, k) for k in range(4))):
            passes[k][i] = None
        return passes

    def groups(params):
        return [
            {"params": params[:2] + params[7:], "rho": 0.3, "lr": 0.01, **some},
            {"params": params[2:4], "perturb": False},
            {"params": params[4:7], "weight_decay": 0.1, "adaptive": True, "sigma": 0.2, "lmbda": 0.5, **others},
        ]

    compare(code, "F-SAM sigma=1.0 lmbda=0.9", base, torch.float32, edit=missing, groups=groups)


SECOND_SIDES = [
    ("GSAM", "SGD nesterov", torch.float32),
    ("everything", "SGD maximize", torch.bfloat16),
    ("everything", "SGD", torch.float64),
    ("decoupled WSAM", "AdamW", torch.float16),
    ("LookSAM", "Adam", torch.float64),
    ("everything", "AdamW maximize", torch.float32),
]


@pytest.mark.parametrize(("mixture", "base", "dtype"), SECOND_SIDES, ids=lambda x: str(x).removeprefix("torch."))
def test_second_side_equals_the_specification(code, mixture, base, dtype):
    def miss(passes):
        passes[0][3] = passes[1][0] = passes[3][6] = None
        return passes

    options = dict(groups=second_side.several_groups, grad_scale=0.5, edit=miss)
    second_side.compare(code.backend, base, mixture, dtype, some_tensors, **options)


def test_without_direct_coefficients_and_learning_rate_no_bit_changes(code):
    before, after = second_side.without_a_step(code.backend)
    assert before == after


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_second_side_without_a_stored_vector(code, base):
    second_side.compare(code.backend, base, "Stable SAM", torch.float32, some_tensors, stored=False)


@pytest.mark.parametrize(("base", "where"), [("SGD momentum", "s"), ("AdamW", 1)], ids=["s", "second gradient"])
def test_a_second_side_that_overflows_writes_nothing(code, base, where):
    before, after = second_side.spoiled(code.backend, base, where, float("nan"))
    assert before == after


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_several_types(code, weights):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")
    ends = []
    for backend in (code.backend, "torch"):
        params = [torch.nn.Parameter(noise((n,), n, weights)) for n in (3000, 1029, 1500)]
        optimizer = fastsam.FriendlySAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
        for k in range(4):
            for p, dtype in zip(params, (torch.float32, torch.bfloat16, torch.float16), strict=True):
                p.grad_dtype = None
                p.grad = noise(p.shape, 10 * k + len(p), dtype)
            (optimizer.second_step if k % 2 else optimizer.first_step)()
        ends.append(copies(params))
    assert_same_rounding(ends[:1], ends[1:], weights)


@pytest.mark.parametrize(("base", "bad"), [("SGD momentum", float("nan")), ("AdamW", float("inf"))])
@pytest.mark.parametrize("which", [0, 1], ids=["first pass", "second pass"])
def test_a_step_that_overflows_changes_nothing_and_the_next_is_the_first(code, base, bad, which):
    def spoil(passes):
        passes[which][4][123] = bad
        return passes

    method = "F-SAM sigma=1.0 lmbda=0.9"
    seen = after_steps(code.backend, method, base, torch.float32, edit=spoil)
    assert bits(seen[1]) == bits(some_tensors(torch.float32))
    clean = after_steps("torch", method, base, torch.float32, edit=lambda passes: passes[2:])
    assert_same_rounding(seen[2:], clean, torch.float32)


@pytest.mark.parametrize("method", ["SAM", "Eigen-SAM given v"])
def test_gradients_whose_squares_are_beyond_float32(code, method):
    def enlarge(passes):
        return [[g * 1e25 for g in gradients] for gradients in passes]

    compare(code, method, "AdamW", torch.float32, edit=enlarge)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"clip_value": 0.3}], ids=str)
def test_clipping(code, base, options):
    ends = []
    for backend in (code.backend, "torch"):
        params = [torch.nn.Parameter(t) for t in some_tensors(torch.float32)]
        optimizer = build_optimizer("SAM", base, params, backend)
        for k, step in enumerate((optimizer.first_step, lambda o=optimizer: o.second_step(**options))):
            for p, g in zip(params, random_gradients(params, k), strict=True):
                p.grad = g
            step()
        ends.append(copies(params))
    assert_same_rounding(ends[:1], ends[1:], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_restore_is_exact(code, dtype):
    params = [torch.nn.Parameter(t) for t in some_tensors(dtype)]
    before = bits(params)
    optimizer = build_optimizer("SAM", "SGD", params, code.backend)
    for p, g in zip(params, random_gradients(params, 1), strict=True):
        p.grad = g
    with optimizer.perturbed():
        assert bits(params) != before
    assert bits(params) == before
    assert "restore" in code.launched


def test_the_same_bits_in_whatever_order_the_blocks_run(code):
    ends = []
    for code.order, code.resident in ((range, None), (np.random.default_rng(0).permutation, 1), (range, 2)):
        ends.append(list(map(bits, after_steps(code.backend, "Eigen-SAM given v", "AdamW", torch.float32))))
    assert ends[0] == ends[1] == ends[2]


# ---- the tests are tested: with a line broken, they fail ---------------------------------------------------------


class Mutation(NamedTuple):
    broken_pass: str
    pattern: str
    replacement: str | Callable[[re.Match], str]
    notice: str
    count: int = 0  # 0: everywhere


def opposite(found):
    return f"setp.{'nan' if found[1] == 'num' else 'num'}.f32"


MUTATIONS = {
    "a sign": Mutation("descend_sgd", r"\bsub\.rn\.f32", "add.rn.f32", "not close"),
    "a bound": Mutation("climb", r"\bsetp\.lt\.s32", "setp.le.s32", "not given|a race"),
    "a condition": Mutation("climb", r"@%p", "@!%p", "not close|not given|before it was written", 1),
    "a column of a table": Mutation("climb", r"(\+|add\.s64[^;]*, )16\b", r"\g<1>24", "not close|not given"),
    "what a NaN stands for": Mutation("climb", r"setp\.(num|nan)\.f32", opposite, "not close"),
    "a barrier": Mutation("gram", r"bar\.sync\s+0;", "", "a race|different values", 1),
    "a fence": Mutation("gram", r"membar\.gl;|(atom\S*)\.acq_rel", r"\1", "a race"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(code, name):
    mutation = MUTATIONS[name]
    changes = []

    def change(text):
        text, n = re.subn(mutation.pattern, mutation.replacement, text, count=mutation.count)
        changes.append(n)
        return text

    code.broken_pass, code.broken = mutation.broken_pass, change
    with pytest.raises((ptx.Fault, AssertionError), match=mutation.notice):
        compare(code, "F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", torch.float32)
    assert all(changes)


# ---- the interpreter itself --------------------------------------------------------------------------------------

PROGRAM = """
.version 9.0
.shared .align 4 .b8 room[256];
.entry test(.param .u64 memory)
{
    .reg .pred %%p<2>; .reg .b32 %%r<4>; .reg .f32 %%f<2>; .reg .b64 %%rd<4>;
    ld.param.u64 %%rd1, [memory];
    mov.u32 %%r1, %%tid.x;
    setp.lt.u32 %%p1, %%r1, 33;
    mul.wide.u32 %%rd2, %%r1, 4;
    add.s64 %%rd3, %%rd1, %%rd2;
    mov.b32 %%f1, 0f3F800000;
    %s
    ret;
}
"""
FAULTS = {
    "add.f32 %f1, %f1, %f1;": "unknown instruction",  # without .rn it may be contracted into a fused multiply-add
    "ld.global.f32 %f1, [%rd3+4];": "not given",
    "@%p1 ld.global.v2.f32 {%f1, %f0}, [%rd3];": "no multiple",
    "st.global.f32 [%rd3], %f1;": "read-only",
    "ld.shared.f32 %f1, [room];": "before it was written",
    "@%p1 bra $L1; bar.sync 0; $L1:": "only some threads of a block",
    "@%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;": "only some threads of a warp",
    "st.shared.u32 [room], %r1;": "different values",
    "st.shared.f32 [room], %f1; ld.shared.f32 %f1, [room];": "a race",
}


@pytest.mark.parametrize("instructions", FAULTS)
def test_what_a_gpu_need_not_notice_is_an_error(instructions):
    memory = np.zeros(64, np.float32)
    regions = [(memory.ctypes.data, memory.nbytes, False)]
    with pytest.raises(ptx.Fault, match=FAULTS[instructions]):
        ptx.run(ptx.Kernel(PROGRAM % instructions, "test"), [memory.ctypes.data], 1, 64, regions)


def test_a_permutation_takes_the_bytes_that_the_selector_names():
    assert hex(ptx._permuted(np.uint32(0x33221100), np.uint32(0x77665544), np.uint32(0x5410))) == "0x55441100"
    assert hex(ptx._permuted(np.uint32(0x33221100), np.uint32(0x77665544), np.uint32(0x3340))) == "0x33334400"


def test_a_fused_multiply_add_is_rounded_once():
    generator = np.random.default_rng(0)
    x, y, z = generator.standard_normal((3, 2000)).astype(np.float32)
    z[::2] = -(x * y)[::2]  # of which only the product's last digits remain
    x[1], y[1], z[1] = 2**-24 * (1 + 2**-23), 1 - 2**-23, 1 + 2**-23  # rounded to double first, it would be a tie
    for a, b, c, found in zip(x, y, z, ptx._fma_single(x, y, z), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = [np.nextafter(found, np.float32(end)) for end in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(found)) - exact) <= abs(Fraction(float(n)) - exact) for n in near)
    assert ptx._fma_single(x, y, z)[1] == np.float32(1 + 2**-23)


def test_second_moments_below_float32s_normal_numbers(code):
    """Its squares are subnormal: taken for 0, as ``ftz`` has it, they leave epsilon alone to divide by."""

    def groups(params):
        return [{"params": params, "eps": 1e-30}]

    def reduce(passes):
        return [[g * 1e-19 for g in gradients] for gradients in passes]

    actual = after_steps(code.backend, "SAM", "AdamW", torch.float32, edit=reduce, groups=groups)
    expected = after_steps("torch", "SAM", "AdamW", torch.float32, edit=reduce, groups=groups)
    for a, b in zip(actual[3], expected[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
