"""What tests of training share."""

from shades import shades as shades  # a fixture
