# Compiler settings shared by every target.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

find_program(MMFREE_CCACHE ccache)
if(MMFREE_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${MMFREE_CCACHE})
endif()

add_library(mmfree_options INTERFACE)
target_include_directories(mmfree_options INTERFACE ${CMAKE_SOURCE_DIR})
# -ffp-contract=off: a fused multiply-add happens only where the source says fma, which is what keeps
# results the same bits on every instruction set (server/model/NUMERICS.md).
target_compile_options(mmfree_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -ffp-contract=off -fno-math-errno>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${MMFREE_WERROR}>>:-Werror>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:Clang>>:-Wthread-safety>)
# GCC 12 and 13 take std::string's own operator+ for an overlapping copy once it is inlined (GCC bug 105651).
target_compile_options(mmfree_options INTERFACE
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>)
if(MMFREE_SANITIZE)
  target_compile_options(mmfree_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MMFREE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
  target_link_options(mmfree_options INTERFACE -fsanitize=${MMFREE_SANITIZE})
  # With its instrumentation in between, GCC 12 no longer sees that the standard library initialises.
  target_compile_options(mmfree_options INTERFACE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-maybe-uninitialized>)
endif()
