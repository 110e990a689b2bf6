"""Builds one-instruction kernels for the known-answer tests."""

import numpy as np
from ptxemu.cuda import load_ptx

REG = {
    "b8": ".b16",
    "b16": ".b16",
    "u16": ".b16",
    "s16": ".b16",
    "f16": ".b16",
    "bf16": ".b16",
    "b32": ".b32",
    "u32": ".b32",
    "s32": ".b32",
    "f32": ".b32",
    "b64": ".b64",
    "u64": ".b64",
    "s64": ".b64",
    "f64": ".b64",
}
SIZE = {
    "b8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
}


def kernel(decl, body, nparams, extra=""):
    params = ",\n".join(f".param .u64 k_param_{i}" for i in range(nparams))
    loads = "\n".join(f"ld.param.u64 %p{i}_, [k_param_{i}];" for i in range(nparams))
    regs = " ".join(f".reg .b64 %p{i}_;" for i in range(nparams))
    return f""".version 8.7
.target sm_90
.address_size 64
{extra}
.visible .entry k({params}) {{
.reg .b32 %t; .reg .b64 %o;
{regs}
{decl}
{loads}
mov.u32 %t, %tid.x;
{body}
ret;
}}"""


def run(text, inputs, outs, block=None, **kw):
    """Each thread loads one element of every input, runs `text` and stores every output.

    inputs: [(ptx type, array)], outs: [(ptx type, numpy dtype)]; in the text
    the inputs are %a0, %a1, ... and the outputs %d0, %d1, ...
    """
    n = block or len(inputs[0][1])
    decl, body, args = [], [], []
    for i, (t, arr) in enumerate(inputs):
        decl.append(f".reg {REG[t]} %a{i};")
        body.append(f"mad.wide.u32 %o, %t, {SIZE[t]}, %p{i}_; ld.global.b{8 * SIZE[t]} %a{i}, [%o];")
        args.append(np.ascontiguousarray(arr))
    body.append(text)
    res = []
    k = len(inputs)
    for i, (t, dt) in enumerate(outs):
        out = np.zeros(n, dt)
        res.append(out)
        if t == "pred":
            decl.append(f".reg .pred %d{i}; .reg .b32 %q{i};")
            body.append(f"selp.u32 %q{i}, 1, 0, %d{i}; mad.wide.u32 %o, %t, 4, %p{k + i}_; st.global.u32 [%o], %q{i};")
        else:
            decl.append(f".reg {REG[t]} %d{i};")
            body.append(f"mad.wide.u32 %o, %t, {SIZE[t]}, %p{k + i}_; st.global.b{8 * SIZE[t]} [%o], %d{i};")
        args.append(out)
    m = load_ptx(kernel("\n".join(decl), "\n".join(body), len(args)))
    rep = m.launch("k", 1, n, args, **kw)
    assert not rep.errors, rep.errors
    return res[0] if len(res) == 1 else res
