"""The contract of students: images (B, C, H, W) in [0, 1] → member logits (M, B, K).

It is the only one between a student and the rest of the package. What a student does with its rows
and members inside is its own affair.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ensdistill import InputError


class Student(nn.Module):
    """What every student has in common.

    Attributes:
        network: the module that holds all weights; its state is what a weights file stores.
        members: M.
        spec: the arguments of `build_student` that build it again.
        mixes_members: whether a member's logits depend on the other members' images too.
    """

    network: nn.Module
    members: int
    spec: dict[str, Any]
    mixes_members: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), floating point in [0, 1] → logits of every member (M, B, K).

        With images (M, B, C, H, W) each member sees its own. Logits are at least float32, also
        under bfloat16 autocast.

        Raises:
            TypeError: the images are integers.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], not {x.dtype}: convert them, as in "
                "x.float() / 255"
            )
        logits = self.member_logits(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        """Refuse a network that does not give what its kind promises, before it is trained.

        Args:
            x: images (B, C, H, W) in [0, 1], B ≥ 2.

        Raises:
            InputError: it does not.
        """
        architecture = self.spec["architecture"]
        expected = (self.members, len(x), architecture["num_classes"])
        was_training = self.training
        try:
            found = tuple(self.eval()(x).shape)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            shape = "×".join(map(str, x.shape[1:]))
            raise InputError(
                f"{architecture['name']}: cannot take images of {shape} ({reason})"
            ) from error
        finally:
            self.train(was_training)
        if found != expected:
            raise InputError(
                f"{architecture['name']}: its logits have the shape {found[1:]}, not {expected[1:]}"
            )

    def member_logits(self, x: Tensor) -> Tensor:
        """Images as of `forward` → logits (M, B, K), in the precision of the network."""
        raise NotImplementedError

    def of_each(self, x: Tensor) -> Tensor:
        """Images of each member (M, B, C, H, W): its own, or the same for all."""
        return x if x.ndim == 5 else x.expand(self.members, *x.shape)

    @property
    def rows(self) -> int:
        """Rows that the network computes for an image."""
        return self.members

    @property
    def phase(self) -> bool:
        """What `set_progress` may change in a step: some students have a second phase."""
        return False

    def set_progress(self, progress: float) -> None:
        """Told before each epoch which share of the training is done, 0 … 1."""

    def start_from(self, backbone: "Student") -> None:
        """Take over what another student has learnt; only some kinds begin so."""
        raise NotImplementedError

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, each with `lr` and `weight_decay`."""
        parameters = list(self.parameters())
        return [{"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}]

    def adaptive_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The same for AdamW, whose steps do not grow with the gradients."""
        return self.parameter_groups(learning_rate, weight_decay)

    def predictor(self) -> "Student":
        """What is validated, stored, judged and exported: this student, unless it is merged."""
        return self
