"""The dataset card: one static page with pictures, made from a published version alone."""

from pipeline.report.page import Section, write_report

__all__ = ["Section", "write_report"]
