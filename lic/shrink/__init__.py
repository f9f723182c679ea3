"""What the paper is about: the search for widths, the cut, 8 bits."""
