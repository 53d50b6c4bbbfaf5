/* The C interface, compiled as C11: test_c BUNDLE */
#include "export_engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) {                                              \
      printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                    \
    }                                                                \
  } while (0)

/* Ends the program where a call that must succeed did not. */
static void need(ee_status* status) {
  if (!status) return;
  printf("%s\n  fix: %s\n", ee_status_message(status), ee_status_fix(status));
  ee_status_free(status);
  exit(1);
}

static void refused(ee_status* status, ee_code code, const char* part) {
  CHECK(ee_status_code(status) == code);
  CHECK(strstr(ee_status_message(status), part) != NULL);
  CHECK(ee_status_fix(status)[0] != '\0');
  ee_status_free(status);
}

static ee_feed feed(const char* name, ee_dtype dtype, size_t rank, const int64_t* shape, const void* data) {
  ee_feed made = {name, {dtype, rank, shape, data}};
  return made;
}

int main(int argc, char** argv) {
  ee_bundle* bundle = NULL;
  ee_engine* engine = NULL;
  ee_sampler* sampler = NULL;
  ee_pipeline* pipeline = NULL;
  ee_array* array = NULL;
  if (argc < 2) return 2;

  refused(ee_bundle_open("/no/such/place", &bundle), EE_NOT_FOUND, "/no/such/place");
  refused(ee_bundle_open(NULL, &bundle), EE_INVALID_ARGUMENT, "path is NULL");
  CHECK(bundle == NULL);
  need(ee_bundle_open(argv[1], &bundle));
  CHECK(strstr(ee_bundle_manifest(bundle), "\"format_version\"") != NULL);
  need(ee_bundle_golden(bundle, "0/expected", &array));
  CHECK(ee_array_view(array).rank == 4 && ee_array_view(array).dtype == EE_FP32);
  ee_array_free(array);
  refused(ee_bundle_golden(bundle, "nothing", &array), EE_NOT_FOUND, "nothing");

  ee_engine_options options = {0};
  options.name = "nobody";
  refused(ee_engine_open(bundle, &options, &engine), EE_NOT_FOUND, "nobody");
  need(ee_engine_open(bundle, NULL, &engine));
  CHECK(strcmp(ee_engine_name(engine), "ort") == 0);
  int passed = 0;
  need(ee_engine_self_test(engine, &passed));
  CHECK(passed == 1);

  const int64_t rows[] = {2}, shape[] = {2, 1, 2, 4};
  const int64_t timestep[] = {900, 900}, label[] = {3, 5};
  float latent[16], output[16];
  for (int i = 0; i < 16; ++i) latent[i] = (float)i;
  const ee_feed feeds[] = {feed("hidden_states", EE_FP32, 4, shape, latent),
                           feed("timestep", EE_INT64, 1, rows, timestep),
                           feed("class_labels", EE_INT64, 1, rows, label)};
  need(ee_engine_run(engine, feeds, 3, &array));
  need(ee_engine_run_into(engine, feeds, 3, output, 16));
  for (int i = 0; i < 16; ++i) {
    CHECK(output[i] == (float)i * 0.5f + (float)label[i / 8]);
    CHECK(((const float*)ee_array_view(array).data)[i] == output[i]);
  }
  ee_array_free(array);
  refused(ee_engine_run(engine, feeds, 2, &array), EE_INVALID_ARGUMENT, "class_labels");
  refused(ee_engine_run(engine, NULL, 2, &array), EE_INVALID_ARGUMENT, "feeds is NULL");
  refused(ee_engine_run_into(engine, feeds, 3, output, 15), EE_INVALID_ARGUMENT, "16");

  need(ee_sampler_open(engine, &sampler));
  const ee_feed wanted = feed("class_labels", EE_INT64, 1, rows, label);
  need(ee_sampler_sample(sampler, &feeds[0].tensor, &wanted, 1, NULL, 0, &array));
  CHECK(ee_array_view(array).rank == 4 && ee_array_view(array).shape[0] == 2);
  ee_array_free(array);
  refused(ee_pipeline_open(bundle, NULL, &pipeline), EE_UNSUPPORTED, "denoiser alone");

  ee_bundle_close(bundle); /* what was opened of it stays usable */
  need(ee_engine_run_into(engine, feeds, 3, output, 16));
  ee_sampler_close(sampler);
  ee_engine_close(engine);
  ee_engine_close(NULL);
  ee_array_free(NULL);
  ee_status_free(NULL);
  return failures != 0;
}
