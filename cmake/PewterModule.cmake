# pewter_module(NAME SOURCES a.cc... DEPS target... PRIVATE_DEPS target...)
#
# One static library per folder, pewter_<NAME>, whose only public include root holds a link to that folder
# alone. So `#include "server/x.h"` from merge/ does not compile: layers are enforced by the compiler.
# The folder's path below the repository root is its include prefix.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
find_program(PEWTER_CCACHE ccache)
if(PEWTER_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${PEWTER_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${PEWTER_CCACHE})
endif()

# What every target of ours is compiled with. No contraction: an op gives the same bits on every instruction set.
add_library(pewter_options INTERFACE)
target_compile_options(pewter_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers -ffp-contract=off>)
if(PEWTER_SANITIZE)
  # g++ finds uninitialised values in instrumented code that are none.
  target_compile_options(pewter_options INTERFACE
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${PEWTER_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
  string(REPLACE ",fuzzer-no-link" "" link_sanitize "${PEWTER_SANITIZE}")
  target_link_options(pewter_options INTERFACE -fsanitize=${link_sanitize})
endif()

function(pewter_module NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;PRIVATE_DEPS" ${ARGN})
  file(RELATIVE_PATH folder ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
  set(root ${PROJECT_BINARY_DIR}/roots/${NAME})
  get_filename_component(parent ${root}/${folder} DIRECTORY)
  file(MAKE_DIRECTORY ${parent})
  file(CREATE_LINK ${CMAKE_CURRENT_SOURCE_DIR} ${root}/${folder} SYMBOLIC)
  set(target pewter_${NAME})
  if(ARG_SOURCES)
    add_library(${target} STATIC ${ARG_SOURCES})
    target_include_directories(${target} PUBLIC ${root})
    target_link_libraries(${target} PUBLIC pewter_options ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS})
  else()
    add_library(${target} INTERFACE)
    target_include_directories(${target} INTERFACE ${root})
    target_link_libraries(${target} INTERFACE pewter_options ${ARG_DEPS})
  endif()
endfunction()

# pewter_test(NAME SOURCES ... DEPS ... LABELS ...): a GoogleTest program, registered with ctest as one test. Compiling tests takes longer than running them, so that they are hardly optimised.
function(pewter_test NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LABELS" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE pewter_options ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${NAME} PRIVATE PEWTER_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  set(timeout 600)
  if(PEWTER_SANITIZE)
    target_compile_options(${NAME} PRIVATE -O0)
    set(timeout 1200)
  else()
    target_compile_options(${NAME} PRIVATE -O1)
  endif()
  add_test(NAME ${NAME} COMMAND ${NAME})
  set_tests_properties(${NAME} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${timeout})
endfunction()
