"""The loss, the optimizer and the loop that three stages share."""
