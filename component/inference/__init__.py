"""Load a result and generate: batch, chat, web page."""
