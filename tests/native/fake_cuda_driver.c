/* A stand-in for libcuda.so.1 that prints what it is asked for. FAKE_CUDA_QUIET prints nothing,
   FAKE_CUDA_FAILS names a function that fails. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int result(const char* function) {
  const char* fails = getenv("FAKE_CUDA_FAILS");
  return fails != NULL && strcmp(fails, function) == 0 ? 999 : 0;
}

static int quiet(void) { return getenv("FAKE_CUDA_QUIET") != NULL; }

int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return result("cuCtxGetCurrent");
}

int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)2;
  if (!quiet()) printf("module %08x\n", *(const unsigned*)image);
  return result("cuModuleLoadData");
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  *function = strdup(name);
  return result("cuModuleGetFunction");
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (!quiet()) printf("attribute %s %d %d\n", (const char*)function, attribute, value);
  return result("cuFuncSetAttribute");
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned shared, void* stream, void** arguments, void** extra) {
  (void)extra;
  if (!quiet()) {
    printf("launch %s grid %u %u %u threads %u %u %u shared %u stream %p batch %d\n",
           (const char*)function, x, y, z, threads, ty, tz, shared, stream, *(int*)arguments[0]);
  }
  return result("cuLaunchKernel");
}

int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "unknown error";
  return 0;
}
