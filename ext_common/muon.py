"""`--optimizer muon`: orthogonalised momentum for the matrices of hidden layers, Adam for the rest.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The update of a matrix is its
momentum with all singular values brought near 1, by a few products of matrices (Newton-Schulz). Scaled as in
Liu et al. 2025 (arXiv 2502.16982, eq. 4) it is as large as Adam's, so that Adam's rates serve both.

Which parameters are such matrices their modules say (`mark_hidden`); of a model that says nothing it is what
`mark_hidden` finds in the whole of it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor, nn

from ext_common.cli import UserError
from ext_common.engine import trained_model

Coefficients = Sequence[tuple[float, float, float]]

# Steps → (a, b, c) of each: odd quintics that in turn bring all of [least, 1] into [0.62, 1.27], least being
# 0.0084, 0.0020 and 0.00048. Each is the best one for the interval that the one before it leaves (Amsel et
# al. 2025, arXiv 2505.16932, algorithm 1), of x / 1.02 but for the last: behind the interval they grow fast,
# and rounding leads there.
COEFFICIENTS: dict[int, Coefficients] = {
    3: (
        (7.9986, -22.5002, 15.9866),
        (3.6588, -2.6333, 0.4945),
        (2.6736, -2.0059, 0.4468),
    ),
    4: (
        (8.2610, -23.4957, 16.7476),
        (4.0335, -2.8853, 0.5213),
        (3.6588, -2.6333, 0.4945),
        (2.6736, -2.0059, 0.4468),
    ),
    5: (
        (8.3265, -23.7444, 16.9377),
        (4.1390, -2.9551, 0.5288),
        (4.0335, -2.8853, 0.5213),
        (3.6588, -2.6333, 0.4945),
        (2.6736, -2.0059, 0.4468),
    ),
}
# Root mean square of Adam's updates, about (Liu et al. 2025).
ADAM_RMS = 0.2
# Last layers of fairseq's models, whose outputs are of the vocabulary.
OUTPUTS = ("output_projection", "fc_out")
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class MuonConfig(FairseqDataclass):
    muon_momentum: float = field(
        default=0.95, metadata={"help": "share of the momentum that stays (Nesterov's)"}
    )
    muon_steps: int = field(
        default=4, metadata={"help": "Newton-Schulz steps: 3 (quick), 4 or 5 (thorough)"}
    )
    muon_dtype: ChoiceEnum(["auto", *DTYPES]) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "of the Newton-Schulz products; auto: bfloat16 where the processor multiplies in it. On"
            " machines that differ say which, or their copies of the model drift apart"
        },
    )
    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "of Adam, for all else"})
    adam_eps: float = field(default=1e-8, metadata={"help": "of Adam"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "share of the weights that goes an update, times the rate"}
    )
    lr: list[float] = II("optimization.lr")


@register_optimizer("muon", dataclass=MuonConfig)
class FairseqMuon(FairseqOptimizer):
    """:class:`Muon` for fairseq, which hands over its parameters as a flat list."""

    def __init__(self, cfg: MuonConfig, params: Iterable[Tensor]):
        super().__init__(cfg)
        if cfg.muon_steps not in COEFFICIENTS:
            known = ", ".join(map(str, COEFFICIENTS))
            raise UserError(f"--muon-steps {cfg.muon_steps} is none of {known}")
        if not 0 <= cfg.muon_momentum < 1:
            raise UserError(f"--muon-momentum {cfg.muon_momentum:g} is not in [0, 1)")
        params = list(params)
        numbers = numbers_of(params)
        device = params[0].device
        dtype = DTYPES.get(str(cfg.muon_dtype)) or quickest(device)
        hidden = [(p, n) for p, n in zip(params, numbers, strict=True) if n]
        rest = [p for p, n in zip(params, numbers, strict=True) if not n]
        self._optimizer = Muon(
            hidden, rest, coefficients=COEFFICIENTS[cfg.muon_steps], dtype=dtype, **self.settings
        )

    @property
    def settings(self) -> dict[str, Any]:
        betas = self.cfg.adam_betas
        return {
            "lr": self.cfg.lr[0],
            "momentum": self.cfg.muon_momentum,
            "betas": numbers_in(betas) if isinstance(betas, str) else tuple(betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What a resumed training takes from its own options and not from the checkpoint."""
        return self.settings


class Muon(torch.optim.AdamW):
    """Matrices by Muon, the rest by AdamW, at one rate.

    hidden: (parameter, number): `number` matrices of (rows, columns) above one another, whose first axis is
    rows and whose others together are columns. dtype: of the products. norm: see `orthogonalised`.
    """

    def __init__(
        self,
        hidden: Sequence[tuple[Tensor, int]],
        rest: Sequence[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        coefficients: Coefficients = COEFFICIENTS[4],
        dtype: torch.dtype = torch.float32,
        norm: str = "schatten",
    ):
        groups: list[dict[str, Any]] = [
            {"params": [p for p, _ in hidden], "numbers": [n for _, n in hidden]},
            {"params": list(rest), "numbers": []},
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.param_groups[0]["momentum"] = momentum
        self.coefficients, self.dtype, self.norm = coefficients, dtype, norm

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self._step_hidden(groups[0])
        try:
            self.param_groups = groups[1:]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_hidden(self, group: dict[str, Any]) -> None:
        both = zip(group["params"], group["numbers"], strict=True)
        hidden = [(p, n) for p, n in both if p.grad is not None]
        if not hidden:
            return
        params = [p for p, _ in hidden]
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                # the counter is of no use here, but Adam's wants every state to have one
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        # all matrices of one shape, whichever way they lie, are one batch
        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor, bool]]] = {}
        for p, (_, number), update in zip(params, hidden, updates, strict=True):
            wanted = as_matrices(update, number)
            lies = wanted.shape[1] > wanted.shape[2]
            wanted = wanted.mT if lies else wanted
            batches.setdefault(wanted.shape[1:], []).append((p, wanted, lies))
        for (_, long), batch in batches.items():
            stacked = torch.cat([wanted.to(self.dtype) for _, wanted, _ in batch])
            made = orthogonalised(stacked, self.coefficients, self.norm)
            rate = group["lr"] * ADAM_RMS * long**0.5
            parts = made.split([len(wanted) for _, wanted, _ in batch])
            for (p, _, lies), part in zip(batch, parts, strict=True):
                p.add_((part.mT if lies else part).reshape(p.shape), alpha=-rate)


# --- which parameters -----------------------------------------------------------------------------


def mark_hidden(module: nn.Module, leave: Collection[str] = OUTPUTS) -> None:
    """Mark the matrices of hidden layers in a module, those of its parts among them, for Muon.

    They are the weights of linear layers, of convolutions that are not depthwise, of attention and of
    recurrent cells, save those that an embedding shares, and layers whose name is in `leave`. Projections
    in one parameter (q, k and v; the gates of a cell) are matrices apart; a linear layer has as many as
    its attribute `stacked` says.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, inner in module.named_modules():
        if name.rpartition(".")[2] in leave:
            continue
        for weight, number in _matrices_of(inner):
            if id(weight) not in tables and min(as_matrices(weight, number).shape[1:]) > 1:
                weight.hidden_matrices = number  # type: ignore[attr-defined]


def _matrices_of(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield module.in_proj_weight, 3
    elif isinstance(module, nn.Linear):
        yield module.weight, getattr(module, "stacked", 1)
    elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        yield module.weight, 1
    elif type(module) in GATES:
        for weight in module.parameters(recurse=False):
            if weight.dim() == 2:
                yield weight, GATES[type(module)]


def numbers_of(params: Sequence[Tensor]) -> list[int]:
    """How many matrices of hidden layers each parameter is, 0 for one that Adam takes.

    params: those of the model being trained, then others, or their copies in another precision in the same
    order. UserError where they are flattened into one, or none is marked.
    """
    trained = trained_model()
    originals = params
    if trained is not None:
        if not any(map(_number, trained.model.parameters())):
            mark_hidden(trained.model)
        originals = [p for p in trained.model.parameters() if p.requires_grad]
    shapes = [p.shape for p in params]
    if [p.shape for p in originals] != shapes[: len(originals)]:
        raise UserError(
            "--optimizer muon needs the matrices of the model, which are flattened here into one long"
            " vector: give --fp16-no-flatten-grads beside --fp16, or --bf16 or --amp in its place, and no"
            " --ddp-backend that shards them"
        )
    numbers = [*map(_number, originals)]
    if not any(numbers):
        raise UserError(
            "--optimizer muon: no parameter of the model is a matrix of a hidden layer: give --optimizer adam"
        )
    return numbers + [0] * (len(params) - len(numbers))


def _number(param: Tensor) -> int:
    return int(getattr(param, "hidden_matrices", 0))


def as_matrices(weight: Tensor, number: int) -> Tensor:
    """(number · rows, …) → (number, rows, columns)."""
    return weight.reshape(number, weight.shape[0] // number, -1)


# --- pure -----------------------------------------------------------------------------------------


def orthogonalised(x: Tensor, coefficients: Coefficients, norm: str = "schatten") -> Tensor:
    """Matrices (B, m, n), m ≤ n, with the singular vectors they have and singular values near 1.

    X ← aX + (bA + cA²)X with A = XXᵀ, for each (a, b, c) in turn, computed in the dtype of x. X is first
    divided by what is no less than its largest singular value: ‖X‖_F, and with `norm` schatten then by
    ‖XXᵀ‖_F^½, which is closer to it and costs nothing. A matrix of zeros stays one.
    """
    tiny = 1e-7
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=tiny)
    gram = x @ x.mT
    if norm == "schatten":
        size = gram.norm(dim=(1, 2), keepdim=True).clamp(min=tiny)
        x, gram = x / size.sqrt(), gram / size
    last = len(coefficients) - 1
    for step, (a, b, c) in enumerate(coefficients):
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        if step < last:
            gram = x @ x.mT
    return x


def quickest(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported()
    else:
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has else torch.float32


def numbers_in(text: str) -> tuple[float, ...]:
    """The numbers of a tuple as it is typed, `(0.9, 0.98)`."""
    try:
        return tuple(float(part) for part in text.strip("()[] ").split(","))
    except ValueError as error:
        raise UserError(f"--adam-betas {text!r}: give two numbers, as '(0.9, 0.98)'") from error
