"""Texts, their partition among clients, and the token arrays made of them."""
