"""The one stack of linear, norm, activation and dropout from which all parts of the network are built.

Categorical covariates reach a layer as integer codes, one column per covariate, already offset into one table: a
one-hot column times a weight is a row of that table, so nothing is ever concatenated. Source: spec section 0.1, 0.2.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import sparse
from .config import Config


class Draws:
    """The randomness of one pass through the network: a generator of its own, never the global state.

    Parameters
    ----------
    generator
        Source of the noise. None draws nothing: every sample is its mean and dropout must be off.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`."""
        if self.generator is None:
            return torch.zeros_like(like)
        return torch.empty_like(like).normal_(generator=self.generator)

    def keep(self, like: Tensor, rate: float) -> Tensor:
        """Zeros with probability `rate`, else 1 / (1 - rate): a dropout mask.

        Drawing dominates dropout on a CPU, so four 16-bit numbers are cut from each 64-bit one. `like` must be able to
        hold them: float32 or float64.
        """
        if self.generator is None:  # torch would take its global one
            raise ValueError("Dropout in training mode needs a generator: Draws(torch.Generator(device)).")
        if like.is_cuda:  # there, launches dominate
            return self.chosen(like, 1 - rate).div_(1 - rate)
        n = like.numel()
        bits = torch.empty(-(-n // 4), dtype=torch.int64, device=like.device)
        bits.random_(-(2**63), None, generator=self.generator)
        scale, dropped = 1 / (1 - rate), round(rate * 65_536) - 32_768  # numbers below `dropped` are
        kept = bits.view(torch.int16)[:n].view(like.shape).to(like.dtype)
        # arithmetic in place of a comparison, which is several times slower on a CPU: below 0 if dropped, else at least
        # `scale`
        return kept.sub_(dropped - 0.5).mul_(2 * scale).clamp_(0, scale)

    def chosen(self, like: Tensor, share: float) -> Tensor:
        """Ones with probability `share`, else zeros."""
        return torch.empty_like(like).bernoulli_(share, generator=self.generator)


class Gaussian(NamedTuple):
    """A diagonal normal distribution; `var` is a variance."""

    mean: Tensor
    var: Tensor

    def sample(self, draws: Draws) -> Tensor:
        """One reparameterised sample."""
        noise = draws.normal(self.mean)
        if (kernels := sparse.kernels_for(self.mean)) is not None:
            return kernels.sample(self.mean, self.var, noise)
        return torch.addcmul(self.mean, self.var.sqrt(), noise)


class Linear(nn.Module):
    """A linear layer with a shift per category of each injected covariate.

    Parameters
    ----------
    n_in, n_out
        Widths.
    n_covariates
        Rows of the covariate table: the sum of the category counts of all injected covariates; 0 for none.
    """

    def __init__(self, n_in: int, n_out: int, n_covariates: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.covariates = nn.Parameter(torch.empty(n_covariates, n_out)) if n_covariates else None

    def reset(self, generator: torch.Generator) -> None:
        """Torch's usual linear start, the one-hot columns counted among the inputs."""
        rows = 0 if self.covariates is None else len(self.covariates)
        bound = (self.weight.shape[1] + rows) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, h: Tensor, codes: Tensor | None, columns: Tensor | None = None) -> Tensor:
        """Map `(..., n_in)` to `(..., n_out)`, or to those `columns` of it that are wanted.

        `codes` `(..., covariates)` are rows of the covariate table.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        covariates: Tensor | None = self.covariates
        if columns is not None:
            weight, bias = weight[columns], bias[columns]
            covariates = None if covariates is None else covariates[:, columns]
        out = functional.linear(h, weight, bias).to(weight.dtype)  # under autocast the product is in bfloat16
        if covariates is not None:
            kernels = sparse.kernels_for(out) if codes.dim() == 2 == out.dim() else None
            for column in codes.unbind(-1):  # in place: nothing looks at what the product alone was
                if kernels is None:
                    out += functional.embedding(column, covariates)
                else:
                    out = kernels.add_rows(out, covariates, column)
        return out


class BatchNorm(nn.Module):
    """Batch norm over all leading axes (momentum 0.01, eps 1e-3, as the published models have it)."""

    running_mean: Tensor
    running_var: Tensor
    total: Callable[[Tensor], Tensor] | None = None
    """Adds up, gradients too, over the processes that share a minibatch; None: this one has all of it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, h: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """Normalise `(..., width)`: by these rows in training, by the running statistics else.

        With `parts`, so many rows each are normalised by themselves.
        """
        if parts is not None and self.training:
            return torch.cat([self(part) for part in h.split(list(parts))])
        rows = h.reshape(-1, h.shape[-1])
        if self.total is not None and self.training:
            return self._by_all(rows, self.total).reshape(h.shape)
        # a single row has no variance to be normalised by: use what is known so far
        from_batch = self.training and len(rows) > 1
        out = functional.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, from_batch, momentum=0.01, eps=1e-3
        )
        return out.reshape(h.shape)

    def _by_all(self, rows: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        """The same, by its definition, for a part of the rows: mean and variance are those of all processes' rows."""
        wide = rows.double()  # in which a difference of squares loses nothing
        sums = total(torch.stack([torch.full_like(wide[0], len(wide)), wide.sum(0), wide.square().sum(0)]))
        n, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        var, mean = (square - mean.square()).to(rows.dtype), mean.to(rows.dtype)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.01)
            self.running_var.lerp_((var * n / (n - 1)).to(rows.dtype), 0.01)
        return (rows - mean) * (var + 1e-3).rsqrt() * self.weight + self.bias


class Stack(nn.Module):
    """Fully connected layers: linear with covariates, batch norm, layer norm, ReLU, dropout, in this order.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Widths are n_in -> n_hidden -> ... -> n_hidden.
    n_covariates
        Rows of each layer's covariate table.
    dropout
        Share of hidden units that are dropped in training.
    batch_norm, layer_norm
        Which norms to use; the layer norm has no parameters of its own.
    inject
        True: covariates enter every layer; False: only the first.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_covariates: int = 0,
        *,
        dropout: float = 0.0,
        batch_norm: bool = True,
        layer_norm: bool = False,
        inject: bool = True,
    ):
        super().__init__()
        self.dropout = dropout
        self.layer_norm = layer_norm
        widths = [n_in] + [n_hidden] * n_layers
        self.linear = nn.ModuleList(
            Linear(widths[i], widths[i + 1], n_covariates if inject or i == 0 else 0) for i in range(n_layers)
        )
        self.norm = nn.ModuleList(BatchNorm(n_hidden) for _ in range(n_layers)) if batch_norm else None

    @classmethod
    def of(
        cls,
        config: Config,
        side: Literal["encoder", "decoder"],
        n_in: int,
        n_layers: int,
        n_covariates: int,
        dropout: float,
        *,
        inject: bool = True,
    ) -> "Stack":
        """The hidden layers of a part of the network, as wide and normed as this side is configured."""
        norms = {f"{kind}_norm": config.norm_of(side, kind) for kind in ("batch", "layer")}
        return cls(n_in, config.n_hidden, n_layers, n_covariates, dropout=dropout, inject=inject, **norms)

    def forward(self, h: Tensor, codes: Tensor | None, draws: Draws, parts: Sequence[int] | None = None) -> Tensor:
        """Map `(..., n_in)` to `(..., n_hidden)`; `parts` of the rows keep their batch norms apart."""
        return self.onward(self.linear[0](h, codes), codes, draws, parts)

    def onward(self, h: Tensor, codes: Tensor | None, draws: Draws, parts: Sequence[int] | None = None) -> Tensor:
        """The rest of the way, from what the first linear layer gives `(..., n_hidden)`."""
        for i, linear in enumerate(self.linear):
            h = h if i == 0 else linear(h, codes)
            if self.norm is not None:
                h = self.norm[i](h, parts)
            if self.layer_norm:
                h = functional.layer_norm(h, h.shape[-1:])
            if not self.training or self.dropout == 0:
                h = functional.relu(h)
            elif (kernels := sparse.kernels_for(h)) is not None and draws.generator is not None:
                h = kernels.relu_dropout(h, draws.chosen(h, 1 - self.dropout), 1 / (1 - self.dropout))
            else:
                h = functional.relu(h)
                h = h * draws.keep(h, self.dropout)
        return h


class GaussianEncoder(nn.Module):
    """A stack with a mean head and a variance head (exponential, at least `floor`)."""

    def __init__(self, stack: Stack, n_hidden: int, n_out: int, *, floor: float = 1e-4):
        super().__init__()
        self.stack = stack
        self.mean = Linear(n_hidden, n_out)
        self.log_var = Linear(n_hidden, n_out)
        self.floor = floor

    def forward(self, h: Tensor, codes: Tensor | None, draws: Draws, parts: Sequence[int] | None = None) -> Gaussian:
        """Distribution over `(..., n_out)`; `parts` of the rows keep their batch norms apart."""
        h = self.stack(h, codes, draws, parts)
        if (kernels := sparse.kernels_for(h)) is None:
            return Gaussian(self.mean(h, None), self.log_var(h, None).exp() + self.floor)
        # both heads in one product: a GPU takes ten times as long for the gradient of a weight of ten rows as of twenty
        heads = self.mean, self.log_var
        weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        return Gaussian(*kernels.heads(functional.linear(h, weight, bias).to(weight.dtype), self.floor))
