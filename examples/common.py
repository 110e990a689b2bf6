"""What the examples share: multi-layer perceptrons, a training loop, predictions, a step's peak memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def mlp(*widths: int, dropout: float = 0.0, input_dropout: float = 0.0) -> nn.Sequential:
    """Linear layers from widths[0] inputs to widths[-1] logits, with ReLU and dropout between them."""
    layers: list[nn.Module] = [nn.Dropout(input_dropout)] if input_dropout else []
    for inputs, outputs in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def fit(
    net: nn.Sequential,
    images: Tensor,  # (n, pixels)
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float = 0.0,
    augment: Callable[[Tensor], Tensor] = lambda images: images,
    max_norm: float | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> nn.Sequential:
    """Trains net with AdamW and a one-cycle learning rate of peak lr. `loss` gets the logits of a batch,
    (batch, classes), and the indices of its images, (batch,). max_norm bounds the norm of each hidden unit's
    weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    hidden = [layer.weight for layer in net[:-1] if isinstance(layer, nn.Linear)]
    batches: list[Tensor] = []
    net.train()
    for _ in range(steps):
        batches = batches or list(torch.randperm(len(images)).split(batch))
        rows = batches.pop()
        optimizer.zero_grad()
        loss(net(augment(images[rows])), rows).backward()
        optimizer.step()
        schedule.step()
        if max_norm is not None:
            for weight in hidden:
                weight.data.renorm_(2, 0, max_norm)
        on_step()
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes)."""
    return torch.cat([net(part) for part in images.split(4096)])


def peak_memory(step: Callable[[], object]) -> int:
    """The bytes by which a step raises this process's peak memory (Linux)."""

    def resident(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before
