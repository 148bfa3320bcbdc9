"""The rule language: load, match, test."""

from appliance.rules.book import RuleBook, RuleSet
from appliance.rules.load import load, load_text
from appliance.rules.match import Subject
from appliance.rules.schema import schema
from appliance.rules.suite import TestResult

__all__ = ["RuleBook", "RuleSet", "Subject", "TestResult", "load", "load_text", "schema"]
