"""Texts, who owns them, and the token arrays made of them."""
