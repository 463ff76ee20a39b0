"""Triage decisions measured: by likelihood and by generation, with intervals that respect groups."""
