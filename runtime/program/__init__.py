"""A compiled program as data: variants, regions' calls, tables, packed weights."""
