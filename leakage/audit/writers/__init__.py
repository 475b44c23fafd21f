"""Writers of an audit's files: an HTML page, JUnit XML, SARIF and a section for a model card."""

from leakage.audit.writers.junit import junit_xml
from leakage.audit.writers.model_card import model_card_section
from leakage.audit.writers.page import render_page
from leakage.audit.writers.sarif import sarif_log

__all__ = ["junit_xml", "model_card_section", "render_page", "sarif_log"]
