"""The version of this package, for outputs that say what wrote them."""

VERSION = "0.1.0"
