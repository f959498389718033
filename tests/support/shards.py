"""One batch in four shards, its oracle, and a training step whose every result is checked against it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jbn
from tests.support import oracle

SHARDS, ROWS, C = 4, 6, 5


def mesh(shape=(SHARDS,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def split(a):
    """Give each shard a row of its own."""
    return None if a is None else a.reshape(SHARDS, -1, *a.shape[1:])


class Setting:
    """One batch, whose shards differ much in mean; some rows are masked, one shard entirely.

    ``groups`` are lists of rows that are a batch of their own; without them all rows are.
    """

    def __init__(self, mean=0.0, masked=False, warm=False, groups=None):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((SHARDS, ROWS, C)) + np.arange(SHARDS)[:, None, None] + mean
        self.x = x.reshape(-1, C).astype(np.float32)
        self.g = rng.standard_normal(self.x.shape).astype(np.float32)
        self.scale, self.bias = (rng.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(2))
        self.mask = None
        if masked:
            valid = rng.random((SHARDS, ROWS, 1)) < 0.6
            valid[0, 0], valid[2] = True, False
            self.mask = valid.reshape(-1, 1)
            self.x = np.where(self.mask, self.x, np.nan).astype(np.float32)
        whole = oracle.forward(self.x, self.scale, self.bias, mask=self.mask)
        old = (whole.mean + 0.1, whole.var) if warm else (np.zeros(C), np.ones(C))
        self.state = jbn.State(*(jnp.asarray(v, jnp.float32) for v in old))
        self.want, self.grads = whole._asdict(), dict[str, np.ndarray]()
        self.size = {
            "x": np.ones(self.x.shape)
        }  # of the terms that dx is the sum of: in a group of few rows they cancel
        for rows in [np.arange(len(self.x))] if groups is None else groups:
            mask = None if self.mask is None else self.mask[rows]
            part = oracle.gradients(self.g[rows], self.x[rows], self.scale, self.bias, mask=mask)
            self.want["y"][rows] = oracle.forward(self.x[rows], self.scale, self.bias, mask=mask).y
            self.grads.setdefault("x", np.zeros(self.x.shape))[rows] = part["x"]
            spread = np.sqrt(oracle.moments(self.x[rows], mask=mask)[2] + 1e-5)
            self.size["x"][rows] += np.abs(self.g[rows]).max() * self.scale / spread
            for name in ("scale", "bias"):
                self.grads[name] = self.grads.get(name, 0) + part[name]
        self.bound = oracle.tolerance("float32", len(self.x))

    def step(self, x, mask, g, scale, bias, state, **options):
        """Return y, the new state and the gradients of this shard's Σ g·y."""

        def loss(x, scale, bias):
            params = jbn.Params(scale, bias)
            y, new = jbn.bn_forward(params, state, x, True, mask=mask, momentum=0.0, **options)
            return (y * g).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, new, grads

    def check(self, y, new, dx, dscale, dbias):
        def near(got, want, name):
            size = np.maximum(np.abs(want).max(), self.size.get(name, 1))
            assert (np.abs(oracle.wide(got) - want) / size).max() <= self.bound, name

        near(y, self.want["y"], "y")
        near(new.mean, self.want["mean"], "mean")
        near(new.var, self.want["var"], "var")
        for name, got in (("x", dx), ("scale", dscale), ("bias", dbias)):
            near(got, self.grads[name], name)
