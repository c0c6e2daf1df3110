# mmfree_library(NAME SRCS files... DEPS targets...)
#   One static library per folder (header-only when it has no SRCS). DEPS is the architecture: a layer
#   sees exactly the layers it names, so `grep DEPS -r server` reads off the layer graph.
function(mmfree_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${name} STATIC ${ARG_SRCS})
    target_link_libraries(${name} PUBLIC mmfree_options ${ARG_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE mmfree_options ${ARG_DEPS})
  endif()
endfunction()

# mmfree_binary(NAME SRCS files... DEPS targets...)
function(mmfree_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE mmfree_options ${ARG_DEPS})
endfunction()

# The limit of a test, in seconds: only a hang reaches it. Several times that under a sanitizer
# (tests/support/patience.h).
set(MMFREE_TEST_TIMEOUT 300)
if(MMFREE_SANITIZE)
  set(MMFREE_TEST_TIMEOUT 2400)
endif()

# mmfree_test(NAME SRCS files... DEPS targets... [LABELS labels...] [TIMEOUT seconds])
#   A GoogleTest program whose tests ctest lists one by one. A skipped test prints why.
function(mmfree_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT ${MMFREE_TEST_TIMEOUT})
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE mmfree_options ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE
    MMFREE_SOURCE_DIR="${CMAKE_SOURCE_DIR}" MMFREE_BINARY_DIR="${CMAKE_BINARY_DIR}")
  include(GoogleTest)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST
    PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()
