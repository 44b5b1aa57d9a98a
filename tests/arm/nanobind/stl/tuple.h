#pragma once  // nanobind.h has it
