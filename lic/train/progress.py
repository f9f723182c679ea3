"""How far a loop has come: a line every ten seconds."""

import time


class Progress:
    """Prints the means of what a loop reports, and the time left, about every ten seconds.

    Means and pace are those since the line before. steps: of the whole loop; done: where it starts.
    """

    def __init__(self, steps, done=0):
        self.steps, self.done, self.printed = steps, done, time.monotonic()
        self.sums, self.count = {}, 0

    def update(self, **figures):
        """One more step is done. figures: 0-d tensors, averaged until the next line."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        self.done += 1
        now = time.monotonic()
        if self.done < self.steps and now - self.printed < 10:
            return
        pace = (now - self.printed) / self.count
        minutes, seconds = divmod(int(pace * (self.steps - self.done)), 60)
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        text = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(
            f"step {self.done}/{self.steps}  {text}  {pace:.3f} s/step  "
            f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}",
            flush=True,
        )
        self.printed, self.sums, self.count = now, {}, 0
