"""A killed fit can go on: one safetensors file, written anew after every epoch, with the rest of the state as JSON."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_SCALARS = ("epoch", "lr_scale", "retries", "best_loss", "best_epoch", "history", "finished")


def save_checkpoint(path: Path, state, fingerprint: str) -> None:
    """Write the whole state of a fit; the file is replaced at once, so a kill leaves the old or the new one."""
    tensors = {f"network/{name}": value for name, value in state.network.state_dict().items()}
    for name, value in (state.best_weights or {}).items():
        tensors[f"best/{name}"] = value
    tensors |= _optimizer_tensors("optimizer", state.optimizer)
    if state.adversary is not None:
        tensors |= {f"adversary/{name}": value for name, value in state.adversary.state_dict().items()}
        tensors |= _optimizer_tensors("adversary_optimizer", state.adversary_optimizer)
    tensors |= {"shuffle": state.shuffle.get_state(), "noise": state.noise.get_state()}
    scalars = {name: getattr(state, name) for name in _SCALARS} | {"fingerprint": fingerprint}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, {"state": json.dumps(scalars)})
    os.replace(part, path)


def load_checkpoint(path: Path, state, fingerprint: str) -> None:
    """Put a saved state into a freshly started one.

    Raises
    ------
    ValueError
        If the file is damaged, or belongs to other data, another model or other options.
    """
    try:
        with safe_open(path, framework="pt", device=str(state.noise.device)) as file:
            scalars = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint that anvi can read ({error}); delete it to start anew."
        ) from error
    if scalars.pop("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} belongs to another fit (other cells, genes, options or anvi version). "
            "Give this fit another checkpoint=, or delete the file to start anew."
        )
    for name in _SCALARS:
        setattr(state, name, scalars[name])
    state.network.load_state_dict(_under("network", tensors))
    state.best_weights = _under("best", tensors) or None
    _load_optimizer("optimizer", state.optimizer, tensors)
    if state.adversary is not None:
        state.adversary.load_state_dict(_under("adversary", tensors))
        _load_optimizer("adversary_optimizer", state.adversary_optimizer, tensors)
    state.shuffle.set_state(tensors["shuffle"].cpu())
    state.noise.set_state(tensors["noise"].cpu())


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    slots = optimizer.state_dict()["state"]
    return {f"{prefix}/{i}/{name}": value for i, slot in slots.items() for name, value in slot.items()}


def _load_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in _under(prefix, tensors).items():
        i, name = path.split("/")
        slots.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
