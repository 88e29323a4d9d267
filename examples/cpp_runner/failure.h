#pragma once

#include <stdexcept>

// An error whose text is for the user: one line.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
