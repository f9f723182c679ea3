"""The learning rate: a function of the step and the number of steps alone."""


def learning_rate(step, steps, peak):
    """Linear warm-up, constant, then linear to peak / 50 over the last two thirds."""
    warmup, decline = milestones(steps)
    if step < decline:
        return peak * min(1, (step + 1) / warmup)
    return peak * (1 - 0.98 * (step - decline) / max(1, steps - decline))


def milestones(steps):
    """Length of the warm-up, and the step at which the decline begins.

    From 14,000 steps on the warm-up is the same, so that a run can be prolonged as if it had been
    meant to be longer from the start.
    """
    return min(280, max(1, steps // 50)), steps // 3
