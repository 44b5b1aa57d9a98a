# Found in nanobind's place: the module becomes a program that serves its functions (server.cpp).
function(nanobind_add_module name)
  list(REMOVE_ITEM ARGN STABLE_ABI NB_STATIC NOMINSIZE)
  add_executable(${name} ${ARGN} ${nanobind_DIR}/server.cpp)
  target_include_directories(${name} PRIVATE ${nanobind_DIR})
  target_link_options(${name} PRIVATE -static)
endfunction()
