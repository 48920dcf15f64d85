"""Exporters: one file per target, each packs a CompiledModel into an artifact."""
