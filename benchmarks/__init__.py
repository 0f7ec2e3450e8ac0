"""How fast the library is and what memory it needs, beside its peers."""
