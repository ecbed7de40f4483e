"""The parts of report.html: its markup and its plots."""
