"""add_rms_norm and add_layer_norm by their definition, and by plain torch: one call and its checks."""

from __future__ import annotations

import torch
from torch.nn import functional

import embedding_kernels as ek
from embedding_kernels import reference
from error_rule import assert_within_rule
from operators import assert_same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """One call, with its definition in float64 and its plain counterpart, both from the rounded sum."""

    def __init__(self, rows, dim, kind="rms", dtype=torch.float32, residual=True, wide=False, eps=1e-5):
        vectors = torch.float32 if wide else dtype
        self.kind, self.eps = kind, eps
        self.tensors = {"x": torch.randn(rows, dim).to(dtype)}
        if residual:
            self.tensors["residual"] = torch.randn(rows, dim).to(dtype)
        self.tensors["weight"] = torch.randn(dim).to(vectors)
        if kind == "layer":
            self.tensors["bias"] = torch.randn(dim).to(vectors)

    def kernel(self, backend, device, tensors=None):
        moved = {name: tensor.to(device) for name, tensor in (tensors or self.tensors).items()}
        x, residual, weight = moved["x"], moved.get("residual"), moved["weight"]
        if self.kind.startswith("layer"):
            bias = moved.get("bias")
            return ek.add_layer_norm(x, residual, weight, bias=bias, eps=self.eps, backend=backend)
        more = self.kind == "one_plus_weight"
        return ek.add_rms_norm(x, residual, weight, eps=self.eps, one_plus_weight=more, backend=backend)

    def summed(self):
        x = self.tensors["x"]
        return x + self.tensors["residual"] if "residual" in self.tensors else x

    def after_the_sum(self):
        """What the norm is a function of."""
        rest = {name: tensor for name, tensor in self.tensors.items() if name not in ("x", "residual")}
        return {"summed": self.summed(), **rest}

    def exact(self, tensors=None):
        given = {name: t.double() for name, t in self.after_the_sum().items()} if tensors is None else tensors
        if self.kind.startswith("layer"):
            definition, options = reference.add_layer_norm, {"bias": given.get("bias")}
        else:
            definition, options = reference.add_rms_norm, {"one_plus_weight": self.kind == "one_plus_weight"}
        return definition(given["summed"], None, given["weight"], eps=self.eps, **options)[0]

    def plain(self, tensors=None):
        """torch's own norm of the rows in float32, rounded once."""
        given = self.after_the_sum() if tensors is None else tensors
        rows, weight = given["summed"].float(), given["weight"].float()
        if self.kind.startswith("layer"):
            bias = given["bias"].float() if "bias" in given else None
            normed = functional.layer_norm(rows, weight.shape, weight, bias, self.eps)
        else:
            factor = weight + 1 if self.kind == "one_plus_weight" else weight
            normed = functional.rms_norm(rows, weight.shape, factor, self.eps)
        return normed.to(given["summed"].dtype)

    def absolute(self):
        """(normal, scale, factor, bias): the definition's parts over absolute values."""
        given = {name: tensor.double() for name, tensor in self.after_the_sum().items()}
        rows, bias = given["summed"], given.get("bias", torch.zeros(()).double())
        mean = rows.mean(-1, keepdim=True) if self.kind.startswith("layer") else torch.zeros(()).double()
        scale = torch.rsqrt((rows - mean).square().mean(-1, keepdim=True) + self.eps)
        around = rows.abs().mean(-1, keepdim=True) if self.kind.startswith("layer") else 0
        factor = given["weight"].abs() + (self.kind == "one_plus_weight")
        return (rows.abs() + around) * scale, scale, factor, bias.abs()

    def magnitude(self):
        """A term with the n-th power of the scale, which is rounded itself, counts 1 + n times."""
        normal, _, factor, bias = self.absolute()
        return 2 * normal * factor + bias

    def check_forward(self, backend, device):
        normed, summed = (out.cpu() for out in self.kernel(backend, device))
        assert_same(summed, self.summed())
        assert_within_rule(normed, self.exact(), self.plain(), self.magnitude())

    def gradient_magnitudes(self, grad, grad_summed):
        normal, scale, factor, _ = self.absolute()
        grad = grad.double().abs()
        h = grad * factor
        rows = 2 * h + 4 * normal * (h * normal).mean(-1, keepdim=True)
        if self.kind.startswith("layer"):
            rows = rows + 2 * h.mean(-1, keepdim=True)
        rows = rows * scale + (0 if grad_summed is None else grad_summed.double().abs())
        return {"x": rows, "residual": rows, "weight": 2 * (grad * normal).sum(0), "bias": grad.sum(0)}

    def of_the_inputs(self, grad):
        """The gradient of x and of the residual, given that of what is normed."""
        return grad

    def check_gradients(self, backend, device, grad, grad_summed):
        leaves = {name: t.detach().clone().to(device).requires_grad_() for name, t in self.tensors.items()}
        outs, slopes = self.kernel(backend, device, leaves), [grad.to(device), grad_summed]
        if grad_summed is None:
            outs, slopes = outs[:1], slopes[:1]
        else:
            slopes[1] = grad_summed.to(device)
        found = dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), slopes), strict=True))
        magnitudes = self.gradient_magnitudes(grad, grad_summed)
        exact = through(self.exact, {name: t.double() for name, t in self.after_the_sum().items()}, grad, grad_summed)
        plain = through(self.plain, self.after_the_sum(), grad, grad_summed)
        for name, gradient in found.items():
            assert gradient.dtype == self.tensors[name].dtype
            results = gradient.cpu(), exact[name], plain[name], magnitudes[name]
            if name in ("x", "residual"):
                results = results[0], *map(self.of_the_inputs, results[1:])
            # the gradient of a vector is one row: of a single value plain torch may have no error, by luck
            assert_within_rule(*(t[None] if t.dim() == 1 else t for t in results))


def through(norm, tensors, grad, grad_summed):
    """Gradients of the rounded sum, which are those of x and of the residual, and of the vectors."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    normed = norm(leaves)
    found = dict(zip(leaves, torch.autograd.grad(normed, list(leaves.values()), grad.to(normed.dtype)), strict=True))
    rows = found.pop("summed")
    rows = rows if grad_summed is None else rows + grad_summed.to(rows.dtype)
    return {"x": rows, "residual": rows, **found}


def answers(case, backend, device, layout, grads):
    """Both outputs and all gradients, of rows and gradients laid out so."""
    leaves = {
        name: (layout(tensor.to(device)) if tensor.dim() == 2 else tensor.to(device)).detach().requires_grad_()
        for name, tensor in case.tensors.items()
    }
    outs = case.kernel(backend, device, leaves)
    found = torch.autograd.grad(outs, list(leaves.values()), [layout(grad.to(device)) for grad in grads])
    return (*(out.detach() for out in outs), *found)
