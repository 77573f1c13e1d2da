"""Long question answering and summaries, as L-Eval and LongBench score them."""
