"""Programs for those who work on detrkit; they build on the tests and belong to no release."""
