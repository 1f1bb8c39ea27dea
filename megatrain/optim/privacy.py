"""Noise of differentially private training, and what the training has revealed."""

import hashlib
import hmac
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatrain.optim.privacy_config import PrivacyConfig
from megatrain.runtime.packages import require_package

ORDERS = [1 + n / 10 for n in range(1, 100)] + [*range(12, 64), 128, 256, 512]
"""Orders of Rényi divergence among which the best bound is searched."""
CHUNK = 1 << 18
"""Values that are drawn at a time."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Normal values that are a function of a secret, the run, the step, the parameter's name and the element's number.

    The bits are AES-256 in counter mode: without the secret nobody can tell them from random ones, so that a known seed
    does not undo the noise. The same in every layout, and drawn again when a step is done again after a kill.
    """

    secret: bytes = field(repr=False)
    run_id: str
    seed: int

    def normal(self, shape: torch.Size, *, step: int, name: str) -> Tensor:
        """Return standard normal float64 values of `shape`, on the CPU (Box-Muller, 53 bits)."""
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        label = "\0".join(("megatrain noise", self.run_id, str(self.seed), str(step), name))
        key = hmac.digest(self.secret, label.encode(), hashlib.sha256)
        stream = Cipher(AES(key), CTR(bytes(16))).encryptor()  # a key of its own: the counter may begin at 0
        found = np.empty(math.prod(shape))
        for start in range(0, len(found), CHUNK):
            count = min(CHUNK, len(found) - start)
            bits = np.frombuffer(stream.update(bytes(16 * count)), dtype="<u8") >> np.uint64(11)
            share, angle = ((bits.reshape(count, 2) + np.array([0.5, 0.0])) * 2.0**-53).T  # share in (0, 1)
            found[start : start + count] = np.sqrt(-2 * np.log(share)) * np.cos(2 * math.pi * angle)
        return torch.from_numpy(found).reshape(shape)


def require_privacy_packages() -> None:
    """Refuse private training if a package of the extra `privacy` is missing.

    Raises:
        UserError: one is; says how to get it.
    """
    for package in ("opacus", "cryptography"):
        require_package(package, "privacy.noise_multiplier")


class Accountant:
    """The epsilon after each step, by the accounting of opacus (Rényi differential privacy, arXiv 1908.10530)."""

    def __init__(self, cfg: PrivacyConfig, *, samples: int, batch: int) -> None:
        """Prepare to account for batches of `batch` of `samples` samples, each of which comes once in an epoch."""
        self._samples, self._batch = samples, batch
        self._delta = cfg.delta
        self._once = self._divergence(cfg.noise_multiplier, 1.0)
        self._sampled = self._divergence(cfg.noise_multiplier, min(1.0, batch / samples))

    def after(self, steps: int) -> dict[str, float]:
        """Return the metrics after `steps` batches.

        `privacy/epsilon` is proven for the batches as they are drawn: a sample is in one batch of each epoch, so that
        it has been exposed to the noise of as many steps as there were epochs (`exposures`), and nothing is claimed
        from which batch it was in. `privacy/epsilon_poisson` is the figure that is usually given: as if each batch had
        been drawn by tossing a coin for each sample, which shuffled batches are not (arXiv 2403.17673).
        """
        return {
            "privacy/epsilon": self._epsilon(self._once * exposures(steps, self._samples, self._batch)),
            "privacy/epsilon_poisson": self._epsilon(self._sampled * steps),
        }

    @staticmethod
    def _divergence(noise_multiplier: float, sample_rate: float) -> np.ndarray:
        """Return the Rényi divergence of one step at each of `ORDERS`."""
        from opacus.accountants.analysis.rdp import compute_rdp

        return np.asarray(
            compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS), dtype=float
        )

    def _epsilon(self, divergence: np.ndarray) -> float:
        from opacus.accountants.analysis.rdp import get_privacy_spent

        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Optimal order is the"
            )  # then the bound is not the tightest
            epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=divergence, delta=self._delta)
        return max(0.0, float(epsilon))


def exposures(steps: int, samples: int, batch: int) -> int:
    """Return the most that one sample may weigh after `steps`, in steps in which it was once.

    A sample comes once in an epoch. Where a batch holds the end of one epoch and the beginning of the next it may come
    twice there, and its clipped gradient counts double, which reveals as much as four steps instead of two.
    """
    epochs = -(-steps * batch // samples)
    return epochs if samples % batch == 0 else epochs + 2 * (epochs // 2)
