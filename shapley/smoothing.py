"""The targets' gradients, smoothed over the steps: a second direction for each target.

In a step few chunks speak for a target, so its gradient g_k is noisy. The mean over the steps is
less so:

    s_k <- beta s_k + (1 - beta) g_k        once a step, from s_k = 0
    s_k / (1 - beta^n)                      after n steps: the weights of their g_k add up to 1

g_k is the gradient that the rule takes in the step, where it takes it. What this gives goes through
the rule as g_k does. What comes of it is a score, not the Shapley value of a step.

A mean holds the step that is under way from the moment its g_k is known. So where that step is
given up, and done once more, it is in the mean already.
"""

import torch


class Smoothing:
    """weights: Weights. beta: so much of the mean remains in the next step's."""

    def __init__(self, weights, n_targets, beta):
        self.weights, self.beta = weights, beta
        self.means = weights.new_directions(n_targets)  # s, K for each parameter
        self.steps = 0  # n, how many steps they hold
        self.last = -1  # the number of the last of these

    @torch.no_grad()
    def join(self, step, gradients):
        """The targets' gradients of a step, per parameter (K, *shape), enter the means. Puts the
        means behind them in their list: (2K, *shape)."""
        if step.number != self.last:
            for mean, gradient in zip(self.means, gradients):
                mean.mul_(self.beta).add_(gradient, alpha=1 - self.beta)
            self.steps += 1
            self.last = step.number
        scale = 1 / (1 - self.beta**self.steps)
        for i, mean in enumerate(self.means):
            # one after another, so that all gradients never exist twice
            gradients[i] = torch.cat([gradients[i], mean * scale])

    def state_dict(self):
        """For a checkpoint, which makes its tensors whole."""
        means = self.weights.as_whole(self.means)
        return {
            "steps": self.steps,
            "last": self.last,
            "means": dict(zip(self.weights.names, means)),
        }

    def load_state_dict(self, state):
        """Raises KeyError or ValueError where the means are not these weights'."""
        self.steps, self.last = state["steps"], state["last"]
        whole = [state["means"][name] for name in self.weights.names]
        for mean, part in zip(self.means, self.weights.as_parts(whole)):
            if mean.shape != part.shape:
                raise ValueError(f"means of shape {tuple(part.shape)}, not {tuple(mean.shape)}")
            mean.copy_(part)
