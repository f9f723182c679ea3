"""What a decoder needs, and the encoder, which is the same networks the other way."""
